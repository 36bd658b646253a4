"""transformers' processors of each family, where torchvision is not installed.

The image processors have Pillow back ends. The video processors have none, so their part is done here frame by frame
with those of images. Transformers' own with torchvision 0.28 gave the same grids and token ids for clips of noise,
gradients and 33x30 pixels; 1 of 100 pixel values differed, by at most 2 of 255 (the two libraries' bicubic).
Nothing here decodes a file: videos are arrays of frames.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, Qwen2_5_VLProcessor, VideoLlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor
from transformers.video_utils import VideoMetadata

#: of the video processors' files; the image processors do not take them
_OTHER_KEYS = (
    "do_sample_frames",
    "fps",
    "image_processor_type",
    "max_frames",
    "min_frames",
    "num_frames",
    "processor_class",
    "video_processor_type",
)

Frames = Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8]


def processor_of(folder: Path) -> Any:
    """The processor of a checkpoint, as AutoProcessor makes it with torchvision.

    `processor(text=..., images=..., return_tensors="pt")` for pictures;
    `processor(text=..., videos=[frames], return_tensors="pt")` for clips, frames uint8 [T, H, W, 3] that were sampled
    already. For Qwen, `video_metadata=[{"total_num_frames": T, "fps": F, "frames_indices": list(range(T))}]` says how
    far apart they are; without it 24 a second.
    """
    family = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if family == "qwen2_5_vl":
        image = Qwen2VLImageProcessorPil.from_pretrained(folder)
        return _QwenProcessor(
            image_processor=image,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            video_processor=_PairVideoProcessor(_video_settings(folder)),
            chat_template=_template(folder),
        )
    if family == "video_llava":
        settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        settings.pop("processor_class")
        return _VideoLlavaProcessor(
            image_processor=VideoLlavaImageProcessor.from_pretrained(folder),
            video_processor=_FrameVideoProcessor(_video_settings(folder)),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            chat_template=_template(folder),
            **settings,
        )
    return AutoProcessor.from_pretrained(folder)


def _template(folder: Path) -> str:
    template = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    return str(template)


def _video_settings(folder: Path) -> dict[str, Any]:
    """What the video processor's file says of single frames, or the image processor's if there is none."""
    files = (folder / "video_preprocessor_config.json", folder / "preprocessor_config.json")
    settings = json.loads(next(file for file in files if file.is_file()).read_text(encoding="utf-8"))
    return {key: settings[key] for key in settings if key not in _OTHER_KEYS}


class _FrameVideoProcessor:
    """Video-LLaVA: each frame as a picture."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, settings: dict[str, Any]) -> None:
        self.image = VideoLlavaImageProcessor(**settings)

    def __call__(self, videos: Sequence[Frames], **_: Any) -> BatchFeature:
        clips = [
            torch.stack(
                [
                    torch.from_numpy(
                        self.image.preprocess(np.asarray(frame), return_legacy_image_output=False)["pixel_values"][0]
                    )
                    for frame in frames
                ]
            ).float()
            for frames in videos
        ]
        return BatchFeature({"pixel_values_videos": torch.stack(clips)})


class _PairVideoProcessor:
    """Qwen2.5-VL: frames two by two, an odd last one twice."""

    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, settings: dict[str, Any]) -> None:
        self.image = Qwen2VLImageProcessorPil(**settings)
        self.merge_size = self.image.merge_size
        self.temporal_patch_size = self.image.temporal_patch_size

    def __call__(
        self,
        videos: Sequence[Frames],
        video_metadata: Sequence[Mapping[str, Any]] | None = None,
        **_: Any,
    ) -> BatchFeature:
        metadata = [VideoMetadata(**item) for item in video_metadata or [{"total_num_frames": len(v)} for v in videos]]
        pixels, grids = zip(*[self._clip(frames) for frames in videos], strict=True)
        return BatchFeature(
            {
                "pixel_values_videos": torch.from_numpy(np.concatenate(pixels)),
                "video_grid_thw": torch.tensor(grids),
                "video_metadata": metadata,
            }
        )

    def _clip(self, frames: Frames) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
        """(patches [P, values], (time, rows, columns)) of one clip.

        The values of a patch are channel, frame, row, column; the image processor repeats its one frame.
        """
        frames = list(frames)
        frames += [frames[-1]] * (-len(frames) % self.temporal_patch_size)
        side = self.image.patch_size
        rows: list[npt.NDArray[np.float32]] = []
        for frame in frames:
            one = self.image(np.asarray(frame), input_data_format="channels_last", return_tensors="np")
            patches = one["pixel_values"].reshape(-1, 3, self.temporal_patch_size, side, side)
            rows.append(patches[:, :, 0])
        _, height, width = (int(number) for number in one["image_grid_thw"][0])
        times = len(frames) // self.temporal_patch_size
        stacked = np.stack(rows).reshape(times, self.temporal_patch_size, height * width, 3, side, side)
        patches = stacked.transpose(0, 2, 3, 1, 4, 5).reshape(times * height * width, -1)
        return np.ascontiguousarray(patches, dtype=np.float32), (times, height, width)


class _QwenProcessor(Qwen2_5_VLProcessor):  # type: ignore[misc]
    """With a video processor that is none of torchvision's."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        assert argument is not None, argument_name


class _VideoLlavaProcessor(VideoLlavaProcessor):  # type: ignore[misc]
    """With a video processor that is none of torchvision's."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        assert argument is not None, argument_name
