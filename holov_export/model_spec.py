"""Plain data that says what a model is: how pictures become pixels, its tower, its language model, its prompts.

Differences between families are values here, never code: which kind of image and video preparation a family has is
the `kind` of its part, and each kind is handled in one function of the runtime.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from holov_export.policies import Frozen

Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Activation = Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]


class ImageSpec(Frozen):
    """How a picture becomes one square of pixels, in the order of Hugging Face's CLIP image processor.

    Attributes:
        pad_to_square: pad the longer side's square with the mean colour before resizing.
        shortest_edge: resize so that the shorter side has this length; None if `resize_to` is given or no resize.
        resize_to: (height, width) to resize to, whatever the aspect ratio.
        crop: (height, width) of the centre crop, zero padded where the picture is smaller; None for no crop.
        resample: Pillow filter.
        rescale_factor: pixel values are multiplied by it (1/255).
        mean, std: per channel, applied after rescaling.
    """

    kind: Literal["square"] = "square"
    pad_to_square: bool = False
    shortest_edge: int | None = Field(default=None, ge=1)
    resize_to: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resample: Filter = "bicubic"
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class TiledImageSpec(Frozen):
    """A picture becomes several squares (LLaVA-NeXT): itself made small, and tiles of it at a higher resolution.

    Attributes:
        tile: how the small picture and each tile become pixels.
        pinpoints: (height, width) in pixels of the resolutions that a picture may be scaled to; multiples of a tile's.
    """

    kind: Literal["tiles"] = "tiles"
    tile: ImageSpec
    pinpoints: tuple[tuple[int, int], ...] = Field(min_length=1)


class PatchImageSpec(Frozen):
    """A picture keeps its aspect ratio and becomes a sequence of patches (Qwen2.5-VL).

    Attributes:
        patch_size: pixels. merge: patches of a token, down and across. temporal: frames of a patch.
        min_pixels, max_pixels: a picture is scaled until its area is between them.
    """

    kind: Literal["patches"] = "patches"
    patch_size: int = Field(ge=1)
    merge: int = Field(ge=1)
    temporal: int = Field(ge=1)
    min_pixels: int = Field(ge=1)
    max_pixels: int = Field(ge=1)
    resample: Filter = "bicubic"
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def token_pixels(self) -> int:
        """Height and width in pixels of what one token stands for."""
        return self.patch_size * self.merge


class NoVideo(Frozen):
    """The model takes no videos."""

    kind: Literal["none"] = "none"


class FramesSpec(Frozen):
    """A clip becomes a fixed number of frames, each of them a square (Video-LLaVA).

    Attributes:
        frames: taken evenly from the clip.
        image: how a frame becomes pixels.
        cls: the CLS token of each frame is one of its tokens, in front of its patches.
    """

    kind: Literal["frames"] = "frames"
    frames: int = Field(ge=1)
    image: ImageSpec
    cls: bool


class FramePairsSpec(Frozen):
    """A clip is sampled in time, and `PatchImageSpec.temporal` frames share their patches (Qwen2.5-VL).

    Attributes:
        fps: frames taken a second. min_frames, max_frames: of a clip.
        min_pixels, max_pixels: a frame is scaled until its area is between them.
        total_pixels: of all frames of a clip together. Where max_pixels a frame would be more, the frames of this clip
            have at most total_pixels / frames, but never less than 1.05 min_pixels.
            Source: transformers 5.23 models/qwen2_vl/video_processing_qwen2_vl.py (`cap_pixels_per_frame`)
        tokens_per_second: distance of the temporal positions of two frames that are one second apart.
    """

    kind: Literal["pairs"] = "pairs"
    fps: float = Field(gt=0)
    min_frames: int = Field(ge=1)
    max_frames: int = Field(ge=1)
    min_pixels: int = Field(ge=1)
    max_pixels: int = Field(ge=1)
    total_pixels: int = Field(ge=1)
    tokens_per_second: int = Field(ge=1)

    def frame_pixels(self, frames: int) -> int:
        """Largest area of a frame in a clip of so many frames, counted before an odd last one is doubled."""
        return max(min(self.max_pixels, self.total_pixels // frames), int(self.min_pixels * 1.05))


class VisionSpec(Frozen):
    """A CLIP vision tower and its projector.

    Attributes:
        image_size, patch_size: pixels.
        width, layers, heads, mlp_width: of the tower as trained (layers that selection does not need are not exported).
        feature_layer: 0-based index of the last encoder layer whose output the projector reads
            (`vision_feature_layer` -2 of 24 layers is index 22). Its CLS attention row is the saliency.
        activation, projector_activation: names of transformers' activations.
    """

    architecture: Literal["clip"] = "clip"
    image_size: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    channels: int = 3
    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    activation: Activation
    layer_norm_eps: float
    feature_layer: int = Field(ge=0)
    projector_activation: Activation
    projector_bias: bool

    @model_validator(mode="after")
    def _consistent(self) -> VisionSpec:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.feature_layer >= self.layers:
            raise ValueError(f"feature_layer {self.feature_layer} is past the last of {self.layers} layers")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def tokens(self) -> int:
        """N: patch tokens of one picture."""
        rows, columns = self.grid
        return rows * columns


class QwenVisionSpec(Frozen):
    """The vision transformer of Qwen2.5-VL: windows, rotary positions, RMS norms, a gated MLP, and its merger.

    Attributes:
        patch_size, window_size: pixels. temporal_patch_size: frames. merge: patches of a token, down and across.
        width, layers, heads, mlp_width: of the tower.
        full_layers: 0-based indices of the layers that attend to the whole picture; the others attend to windows.
        theta: base of the rotary frequencies.
    """

    architecture: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    patch_size: int = Field(ge=1)
    temporal_patch_size: int = Field(ge=1)
    channels: int = 3
    merge: int = Field(ge=1)
    window_size: int = Field(ge=1)
    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    activation: Literal["silu", "gelu", "quick_gelu", "gelu_pytorch_tanh"]
    full_layers: tuple[int, ...]
    norm_eps: float
    theta: float

    @model_validator(mode="after")
    def _consistent(self) -> QwenVisionSpec:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(f"width {self.width} does not give {self.heads} heads of a multiple of 4")
        if self.window_size % (self.patch_size * self.merge):
            raise ValueError(f"window_size {self.window_size} is no multiple of a token's pixels")
        if self.layers - 1 not in self.full_layers:
            raise ValueError("the last layer attends to windows; the saliency needs one that sees the whole picture")
        return self

    @property
    def patch_values(self) -> int:
        """Numbers of one patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Patches of a whole window."""
        return (self.window_size // self.patch_size) ** 2

    @property
    def unit(self) -> int:
        """Patches of a token."""
        return self.merge**2

    @property
    def feature_layer(self) -> int:
        """0-based index of the layer that the saliency comes from: the last."""
        return self.layers - 1


class DecoderSpec(Frozen):
    """The language model, as far as a runtime must know it.

    Attributes:
        width: D. heads, kv_heads, head_width: of its attention. mlp_width: of its gated MLP.
        context: longest sequence. image_token_id: the placeholder in `input_ids`.
        video_token_id: that of videos; None if it takes none.
        mrope_sections: how many rotary frequencies turn by time, height and width; empty if positions are plain
            numbers.
    """

    architecture: str
    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_width: int = Field(ge=1)
    mlp_width: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    context: int = Field(ge=1)
    image_token_id: int = Field(ge=0)
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    video_token_id: int | None = None
    mrope_sections: tuple[int, ...] = ()


class PromptSpec(Frozen):
    """How a question becomes text: the model's own Jinja chat template and the text of its placeholders.

    Attributes:
        video_placeholder: empty if the model takes no videos.
    """

    chat_template: str
    image_placeholder: str = "<image>"
    video_placeholder: str = ""


class ModelSpec(Frozen):
    """A vision-language model: six parts, no optional ones."""

    family: Literal["llava", "llava_next", "qwen2_5_vl", "video_llava"]
    name: str
    image: Annotated[ImageSpec | TiledImageSpec | PatchImageSpec, Field(discriminator="kind")]
    video: Annotated[NoVideo | FramesSpec | FramePairsSpec, Field(discriminator="kind")] = NoVideo()
    vision: Annotated[VisionSpec | QwenVisionSpec, Field(discriminator="architecture")]
    decoder: DecoderSpec
    prompt: PromptSpec

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if (self.image.kind == "patches") != (self.vision.architecture == "qwen2_5_vl"):
            raise ValueError(f"a '{self.vision.architecture}' tower does not read '{self.image.kind}'")
        if self.video.kind == "pairs" and self.image.kind != "patches":
            raise ValueError("pairs of frames are for towers that read patches")
        return self

    @property
    def clip(self) -> VisionSpec:
        """The tower, where it is a CLIP.

        Raises:
            ValueError: it is another one.
        """
        if not isinstance(self.vision, VisionSpec):
            raise ValueError(f"the tower is a '{self.vision.architecture}'")
        return self.vision

    @property
    def image_tokens(self) -> int:
        """N: tokens of the largest picture."""
        if isinstance(self.image, TiledImageSpec):
            side = self.clip.patch_size
            return self.clip.tokens + max((height // side) * (width // side) for height, width in self.image.pinpoints)
        if isinstance(self.image, PatchImageSpec):
            return self.image.max_pixels // self.image.token_pixels**2
        return self.clip.tokens

    @property
    def video_tokens(self) -> int:
        """N: tokens of the largest clip; 0 if the model takes none."""
        if isinstance(self.video, FramesSpec):
            return self.video.frames * (self.clip.tokens + self.video.cls)
        if isinstance(self.video, FramePairsSpec) and isinstance(self.image, PatchImageSpec):
            frames = self.video.max_frames
            return frames * self.video.frame_pixels(frames) // self.image.token_pixels**2 // self.image.temporal
        return 0
