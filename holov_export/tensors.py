"""The values that travel between the stages: plain frozen dataclasses over numpy arrays.

Shape words: B images, N tokens before selection, K budget, D width, S prompt length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CropBox:
    """The part of a photograph that the tower sees, in pixels of the upright original.

    Left and top may be negative (zero padding around a small crop), right and bottom may pass the border.
    """

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Region:
    """A rectangle of tokens that belongs to a picture or clip: the picture made small, its tiles together, one frame.

    Attributes:
        grid: (rows, columns) of tokens.
        box: the part of the upright original that they show.
        cls: a CLS token comes before them.
        newlines: a newline embedding follows each row in the prompt.
        frame: 0-based index of the frame in the clip as it was read; 0 for pictures.
        seconds: distance in time to the region before; 0 for pictures.
    """

    grid: tuple[int, int]
    box: CropBox
    cls: bool = False
    newlines: bool = False
    frame: int = 0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] + self.cls


@dataclass(frozen=True)
class ImageLayout:
    """Where the N tokens of one picture or clip come from, in the order of the prompt: region after region, raster.

    Attributes:
        kind: "image" or "video".
        rows: how many entries of the first axis of `PixelBatch.pixel_values` are its own.
        tower_rows: rows that the tower makes of them.
        source: int64 [N], the row of each token among those.
        regions: their tokens add up to N.
        places: int64 [rows, 2], (row, column) of each patch, for towers that read patches; else empty [0, 2].
        windows: int64 [windows], patches of each window, which follow each other; else empty.
    """

    kind: Literal["image", "video"]
    rows: int
    tower_rows: int
    source: Int64Array
    regions: tuple[Region, ...]
    places: Int64Array
    windows: Int64Array

    @property
    def tokens(self) -> int:
        return int(self.source.shape[0])


@dataclass(frozen=True)
class PixelBatch:
    """Preprocessed pictures and clips.

    Attributes:
        pixel_values: float32 [B, 3, H, W], normalised; of packed graphs [V, 3, H, W] or [P, values of a patch], those
            of one picture after another.
        boxes: for each picture, the part of the original that these pixels show.
        sizes: (width, height) of each upright original.
        layouts: of each picture, for packed graphs; else empty.
    """

    pixel_values: FloatArray
    boxes: tuple[CropBox, ...]
    sizes: tuple[tuple[int, int], ...]
    layouts: tuple[ImageLayout, ...] = ()

    def __len__(self) -> int:
        return len(self.layouts) or int(self.pixel_values.shape[0])

    def part(self, start: int, stop: int) -> PixelBatch:
        """The pictures `start` to `stop` - 1."""
        rows = slice(start, stop)
        if self.layouts:
            ends = np.cumsum([0, *(layout.rows for layout in self.layouts)])
            rows = slice(int(ends[start]), int(ends[min(stop, len(self.layouts))]))
        few = slice(start, stop)
        return PixelBatch(self.pixel_values[rows], self.boxes[few], self.sizes[few], self.layouts[few])


@dataclass(frozen=True)
class VisualTokens:
    """What the vision graph returns.

    Attributes:
        tokens: float [B, K, D]; rows at and past an image's count are zero.
        positions: int64 [B, K], raster index of each kept token among N; -1 where there is none, N for the CLS token.
        counts: int64 [B], real rows of each image.
        saliency: float32 [B, N], or None when the runner was not asked for it.
    """

    tokens: FloatArray
    positions: Int64Array
    counts: Int64Array
    saliency: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def rows(self, image: int) -> FloatArray:
        """[count, D]: the real rows of one image."""
        return self.tokens[image, : int(self.counts[image])]

    def of_image(self, image: int, pixels: PixelBatch) -> ImageRows:
        """The real rows of one image of `pixels`, and where they are."""
        layout = pixels.layouts[image] if pixels.layouts else None
        return ImageRows(self.rows(image), self.positions[image, : int(self.counts[image])], layout)


@dataclass(frozen=True)
class ImageRows:
    """The rows of one picture or clip, as they go into a prompt.

    Attributes:
        rows: float [count, D].
        positions: int64 [count], which of the N tokens each row is; -1 for a zero row.
        layout: of the N tokens; None where all pictures have the same square grid.
    """

    rows: FloatArray
    positions: Int64Array
    layout: ImageLayout | None = None


@dataclass(frozen=True)
class StitchedPrompt:
    """A prompt whose placeholders are as many as the visual rows that replace them.

    Attributes:
        input_ids: int64 [S]; `image_token_id` stands once for every visual row, those of videos as well.
        rows: float [R, D], the visual rows of all images in prompt order.
        counts: rows of each image; sums to R.
        image_token_id: the placeholder.
        text: the rendered prompt, one placeholder an image.
        position_ids: int64 [3, S], time, height and width of each token, where the language model turns its keys by
            three numbers; kept rows have those of the unpruned prompt. None for plain 0, 1, 2, ...
        next_position: of the first new token; None where it is S.
    """

    input_ids: Int64Array
    rows: FloatArray
    counts: tuple[int, ...]
    image_token_id: int
    text: str
    position_ids: Int64Array | None = None
    next_position: int | None = None

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True)
class SamplingSettings:
    """How a decoder picks tokens. `temperature` 0 is greedy; `seed` only matters when it is not.

    Attributes:
        max_new_tokens: at most so many tokens are generated; fewer where the context ends earlier.
        temperature: 0 for greedy, else the softmax temperature.
        top_k: sample among the k most likely tokens; 0 means all.
        top_p: sample in the nucleus of this probability mass.
        seed: of the sampler; None lets the decoder choose.
        stop: further strings that end the answer (they are not part of it).
        stop_token_ids: further token ids that end the answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of each stage of one answer.

    `ttft` is the time from the call to the first generated token: all stages before `decode`, which starts after it.
    `setup` is what the decoder prepares for every prompt, whatever its length (GenAI makes a generator).
    """

    preprocess: float
    vision: float
    stitch: float
    setup: float
    prefill: float
    decode: float

    @property
    def ttft(self) -> float:
        return self.preprocess + self.vision + self.stitch + self.setup + self.prefill

    @property
    def total(self) -> float:
        return self.ttft + self.decode


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: decoded answer, special tokens removed.
        token_ids: generated ids, without the token that ended it.
        finish_reason: "stop" (an end token or stop string) or "length".
        prompt_tokens: length S of the stitched prompt.
        visual_tokens: rows of each image in the prompt.
        timings: seconds of each stage.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    visual_tokens: tuple[int, ...]
    timings: Timings
