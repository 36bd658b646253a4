"""Clips from every kind of source against transformers' processors, and every way a clip can be wrong."""

from __future__ import annotations

import io
import sys
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from runtime.test_preprocess_patches import in_windows, windows_of
from runtime.test_preprocess_patches import model_of as qwen_model
from runtime.test_preprocess_tiles import model_of as next_model
from skimage import data
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor
from transformers.video_utils import VideoMetadata, read_video_pyav

from holov_export.errors import ImageError, MissingExtraError, UsageError, VideoError
from holov_export.runtime import video_container
from holov_export.runtime.preprocess import pixels_from_images, pixels_from_pictures
from holov_export.runtime.preprocess_video import (
    clip_from,
    frames_from,
    joined_batches,
    pixels_from_videos,
    sampled_frames,
)
from holov_export.spec import FramePairsSpec, FramesSpec, ImageSpec, ModelSpec
from holov_export.tensors import CropBox, Region

av = pytest.importorskip("av")

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIDE = 56
WIDE, TALL = 160, 96


def moving(count: int, size: tuple[int, int] = (WIDE, TALL)) -> np.ndarray:
    """uint8 [count, H, W, 3]: a window that travels over a photograph; no two frames are equal."""
    photograph = data.coffee()
    width, height = size
    return np.stack([photograph[i : i + height, 2 * i : 2 * i + width] for i in range(count)])


def write_video(
    path: Path, frames: np.ndarray, *, codec: str = "libx264", fps: int = 10, gop: int = 10, fast: bool = False
) -> Path:
    """`fast` puts the header of an MP4 file in front, as for the web."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if fast else {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = 2
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames, 10 a second, a key frame at every tenth, frames between that are not in the order of the file."""
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", moving(60))


def decoded(path: Path) -> np.ndarray:
    """All frames by transformers' own reader."""
    return np.asarray(read_video_pyav(str(path), lambda metadata: list(range(metadata.total_num_frames)))[0])


def video_llava(image: ImageSpec | None = None, *, cls: bool = True) -> ModelSpec:
    square = image or ImageSpec(shortest_edge=SIDE, crop=(SIDE, SIDE), mean=MEAN, std=STD)
    video = FramesSpec(frames=8, image=square, cls=cls)
    return next_model().model_copy(update={"family": "video_llava", "image": square, "video": video})


def as_images(frames: np.ndarray) -> np.ndarray:
    """float32 [T, 3, H, W] by transformers' processor of Video-LLaVA's images."""
    processor = VideoLlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    made = processor([Image.fromarray(frame) for frame in frames], return_legacy_image_output=False)
    return np.stack(made["pixel_values"])


def as_pairs(frames: np.ndarray, spec: FramePairsSpec, most: int) -> tuple[np.ndarray, torch.Tensor]:
    """(patches [P, 1176], grid [1, 3]) of an even number of frames, by transformers' processor of Qwen's images.

    It repeats its one frame in a patch: the first half of each channel is taken of one frame, the second of the next.
    """
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": spec.min_pixels, "longest_edge": most})
    single = [processor(Image.fromarray(frame), return_tensors="np") for frame in frames]
    halves = [one["pixel_values"].reshape(-1, 3, 2, 196)[:, :, 0] for one in single]
    pairs = [np.stack(halves[i : i + 2], axis=2).reshape(-1, 1176) for i in range(0, len(halves), 2)]
    _, rows, columns = single[0]["image_grid_thw"][0]
    return np.concatenate(pairs), torch.tensor([[len(pairs), int(rows), int(columns)]])


# ------------------------------------------------------------------------------------------------------ Video-LLaVA


@pytest.mark.parametrize("total", [60, 8, 9, 5, 1])
def test_frames_are_bit_equal_to_transformers(total: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", moving(total))
    chosen = np.arange(0, total, total / 8).astype(int)
    batch = pixels_from_videos([path], video_llava())
    np.testing.assert_array_equal(batch.pixel_values, as_images(decoded(path)[chosen]))
    (layout,) = batch.layouts
    assert [region.frame for region in layout.regions] == chosen.tolist()
    assert batch.sizes == ((WIDE, TALL),)
    assert batch.pixel_values.dtype == np.float32


def test_layout_of_frames() -> None:
    (layout,) = pixels_from_videos([moving(16)], video_llava()).layouts
    assert (layout.kind, layout.rows, layout.tower_rows) == ("video", 8, 8 * 17)
    np.testing.assert_array_equal(layout.source, np.arange(8 * 17))
    assert {region.grid for region in layout.regions} == {(4, 4)}
    assert all(region.cls and not region.newlines for region in layout.regions)
    assert layout.tokens == sum(region.tokens for region in layout.regions) == video_llava().video_tokens
    image = video_llava().image
    assert isinstance(image, ImageSpec)
    assert layout.regions[3].box == pixels_from_images([moving(1)[0]], image).boxes[0]
    assert layout.regions[3].box.left > 30
    (plain,) = pixels_from_videos([moving(16)], video_llava(cls=False)).layouts
    assert (plain.tokens, plain.tower_rows) == (8 * 16, 8 * 16)


def test_pictures_of_the_same_model_are_squares() -> None:
    image, model = Image.fromarray(data.chelsea()), video_llava()
    batch = pixels_from_pictures([image], model)
    np.testing.assert_array_equal(batch.pixel_values, as_images(np.asarray(image)[None]))
    assert batch.layouts == ()
    assert isinstance(model.image, ImageSpec)
    np.testing.assert_array_equal(batch.pixel_values, pixels_from_images([image], model.image).pixel_values)


# ------------------------------------------------------------------------------------------------------ Qwen2.5-VL


@pytest.mark.parametrize(("total", "fps"), [(60, 10), (23, 10), (40, 3), (2, 10), (7, 30)])
def test_pairs_are_bit_equal_to_transformers(total: int, fps: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", moving(total), fps=fps)
    model = qwen_model()
    spec = model.video
    assert isinstance(spec, FramePairsSpec)
    batch = pixels_from_videos([path], model)
    count = int(min(max(total / fps * 2.0, 4), 12, total) // 2 * 2)
    chosen = torch.arange(0, total, total / count).int().numpy()[:count]
    patches, grid = as_pairs(decoded(path)[chosen], spec, spec.frame_pixels(count))
    index, windows = windows_of(grid, 112)
    np.testing.assert_array_equal(batch.pixel_values, in_windows(patches, index))
    (layout,) = batch.layouts
    np.testing.assert_array_equal(layout.source, np.argsort(index))
    np.testing.assert_array_equal(layout.windows, windows)
    metadata = VideoMetadata(total_num_frames=total, fps=float(fps), frames_indices=chosen.tolist())
    rows, columns = int(grid[0, 1]) // 2, int(grid[0, 2]) // 2
    assert layout.regions == tuple(
        Region((rows, columns), CropBox(0, 0, WIDE, TALL), frame=int(frame), seconds=2 / metadata.sampled_fps)
        for frame in chosen[::2]
    )
    assert (layout.kind, layout.rows, layout.tower_rows) == ("video", len(patches), len(patches) // 4)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_frames_without_times_are_all_taken_and_an_odd_last_one_twice(count: int) -> None:
    frames, model = moving(count), qwen_model()
    spec = model.video
    assert isinstance(spec, FramePairsSpec)
    batch = pixels_from_videos([frames], model)
    even = np.concatenate([frames, frames[-1:]]) if count % 2 else frames
    patches, grid = as_pairs(even, spec, spec.frame_pixels(count))
    np.testing.assert_array_equal(batch.pixel_values, in_windows(patches, windows_of(grid, 112)[0]))
    assert [region.frame for region in batch.layouts[0].regions] == list(range(0, count, 2))
    assert {region.seconds for region in batch.layouts[0].regions} == {1.0}


def test_more_frames_without_times_than_the_model_takes() -> None:
    regions = pixels_from_videos([moving(30)], qwen_model()).layouts[0].regions
    assert [region.frame for region in regions] == [0, 5, 10, 15, 20, 25]
    assert {region.seconds for region in regions} == {2 / (12 / 30 * 2.0)}


def test_long_clips_have_smaller_frames() -> None:
    model = qwen_model(frame_tokens=(8, 96))
    spec = model.video
    assert isinstance(spec, FramePairsSpec)
    limited = model.model_copy(update={"video": spec.model_copy(update={"total_pixels": 4 * 60 * 784})})
    frames = moving(12, (300, 200))
    few, many = (pixels_from_videos([frames[:count]], limited).layouts[0] for count in (4, 12))
    assert few.regions[0].tokens > 2 * many.regions[0].tokens
    patches, grid = as_pairs(frames, spec, 4 * 60 * 784 // 12)
    assert many.regions[0].grid == (int(grid[0, 1]) // 2, int(grid[0, 2]) // 2)
    assert many.rows == len(patches)


def test_sampled_frames_are_those_of_transformers() -> None:
    """Its expression, with torch; where that gives one index too many, behind the end, the others are compared."""
    spec = FramePairsSpec(
        fps=2.0, min_frames=4, max_frames=768, min_pixels=1, max_pixels=1, total_pixels=1, tokens_per_second=2
    )
    different = frames = 0
    for total in [*range(2, 700), 1800, 5400, 30_000]:
        for fps in (1.0, 2.0, 12.5, 23.976, 25.0, 29.97, 60.0):
            count = int(min(max(total / fps * 2.0, 4), min(768, total) // 2 * 2) // 2 * 2)
            wanted = torch.arange(0, total, total / count).int().numpy()[:count]
            found = sampled_frames(total, fps, spec, 2)
            assert len(found) == count
            assert found.max() < total
            assert np.abs(found - wanted).max() <= 1
            different += int((found != wanted).sum())
            frames += count
    assert different <= frames * 1e-4, "torch rounds by vector lanes: on some machines a few places differ"


def test_torchvision_differs_by_one_level_at_most() -> None:
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.video_llava.video_processing_video_llava import VideoLlavaVideoProcessor

    level = 1.05 / 255 / min(STD)
    frames, model = moving(8, (300, 200)), qwen_model()
    spec = model.video
    assert isinstance(spec, FramePairsSpec)
    processor = Qwen2VLVideoProcessor(
        size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}, cap_pixels_per_frame=True
    )
    made = processor(videos=frames, return_tensors="pt")
    batch = pixels_from_videos([frames], model)
    index, _ = windows_of(made["video_grid_thw"], 112)
    difference = np.abs(batch.pixel_values - in_windows(made["pixel_values_videos"].numpy(), index))
    assert difference.max() <= level
    assert (difference > 1e-5).mean() < 0.01
    other = VideoLlavaVideoProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    wanted = other(videos=frames, return_tensors="pt")["pixel_values_videos"][0].numpy()
    difference = np.abs(pixels_from_videos([frames], video_llava()).pixel_values - wanted)
    assert difference.max() <= level
    assert (difference > 1e-5).mean() < 0.01


# ------------------------------------------------------------------------------------------------------ batches


def test_clips_of_a_batch_follow_each_other() -> None:
    model = qwen_model()
    clips = [moving(4), moving(9, (120, 150)), moving(2)]
    batch = pixels_from_videos(clips, model)
    assert len(batch) == 3
    for index, clip in enumerate(clips):
        single, part = pixels_from_videos([clip], model), batch.part(index, index + 1)
        np.testing.assert_array_equal(part.pixel_values, single.pixel_values)
        np.testing.assert_array_equal(part.layouts[0].places, single.layouts[0].places)


def test_joined_batches() -> None:
    model = qwen_model()
    pictures = pixels_from_pictures([data.chelsea(), data.coffee()], model)
    clips = pixels_from_videos([moving(4)], model)
    joined = joined_batches(pictures, clips)
    assert len(joined) == 3
    assert [layout.kind for layout in joined.layouts] == ["image", "image", "video"]
    assert joined.sizes == ((451, 300), (600, 400), (WIDE, TALL))
    assert len(joined.boxes) == 3
    for index, single in enumerate([pictures.part(0, 1), pictures.part(1, 2), clips]):
        np.testing.assert_array_equal(joined.part(index, index + 1).pixel_values, single.pixel_values)


def test_what_cannot_be_joined() -> None:
    square = pixels_from_pictures([data.chelsea()], video_llava())
    frames = pixels_from_videos([moving(4)], video_llava())
    with pytest.raises(ValueError, match="only batches of packed graphs"):
        joined_batches(square, frames)
    with pytest.raises(ValueError, match="cannot be joined"):
        joined_batches(pixels_from_videos([moving(4)], qwen_model()), frames)


# ------------------------------------------------------------------------------------------------------ sources


CONTAINERS = [
    ("mp4", "libx264"),
    ("mov", "mpeg4"),
    ("mkv", "libx264"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("mpg", "mpeg2video"),
    ("ts", "libx264"),
    ("flv", "libx264"),
]


@pytest.mark.parametrize(("ending", "codec"), CONTAINERS)
def test_single_frames_are_those_of_a_whole_decoding(ending: str, codec: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"film.{ending}", moving(60), codec=codec, fps=25)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    clip = clip_from(path)
    assert (clip.total, clip.size, clip.fps) == (60, (WIDE, TALL), pytest.approx(25))
    for indices in ([0, 1, 2], [59], [3, 3, 18, 19, 44, 44, 59], list(range(60))):
        for index, frame in zip(indices, clip.frames(indices), strict=True):
            np.testing.assert_array_equal(np.asarray(frame), every[index])


def test_bytes_and_order(film: Path) -> None:
    every = decoded(film)
    for source in (film, str(film), film.read_bytes()):
        found = frames_from(source, [40, 3, 40])
        np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in found]), every[[40, 3, 40]])
    with pytest.raises(ValueError, match="has 60 frames"):
        frames_from(film, [60])


class Counting:
    """A container that counts the frames it decodes."""

    def __init__(self, container: Any) -> None:
        self.container, self.decoded = container, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.container, name)

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def decode(self, stream: Any) -> Any:
        for frame in self.container.decode(stream):
            self.decoded += 1
            yield frame


@pytest.mark.parametrize(("indices", "most"), [([0, 55], 8), ([35], 8), ([0, 1, 2], 3), ([8, 9], 10)])
def test_frames_between_are_skipped(
    indices: Sequence[int], most: int, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = clip_from(film)
    wrapped: list[Counting] = []
    opened = video_container._opened

    def counting(*arguments: Any) -> Counting:
        wrapped.append(Counting(opened(*arguments)))
        return wrapped[-1]

    monkeypatch.setattr(video_container, "_opened", counting)
    assert len(list(clip.frames(indices))) == len(indices)
    assert len(wrapped) == 1
    assert wrapped[0].decoded <= most


def test_a_wrong_index_of_key_frames_does_no_harm(film: Path) -> None:
    """A file may call frames key frames that decoding cannot begin at; then everything is decoded."""
    every = decoded(film)
    frames = video_container.container_frames(film, "it", 10**6, 100)
    late = frames.times[33]
    broken = video_container.ContainerFrames(60, 10.0, frames.size, frames.times, (frames.times[0], late))
    found = list(video_container.images_from_container(film, "it", broken, [2, 33, 41]))
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in found]), every[[2, 33, 41]])


def test_frames_without_times_in_the_file_are_counted(film: Path) -> None:
    every = decoded(film)
    frames = video_container.container_frames(film, "it", 10**6, 100)
    bare = video_container.ContainerFrames(60, 10.0, frames.size, (), ())
    found = list(video_container.images_from_container(film, "it", bare, [2, 33, 41]))
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in found]), every[[2, 33, 41]])


def test_a_recording_that_begins_between_key_frames(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "film.ts", moving(60)).read_bytes()
    part = whole[len(whole) // 188 // 4 * 188 :]
    with av.open(io.BytesIO(part)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0) if not frame.is_corrupt]
    clip = clip_from(part)
    assert 30 <= clip.total < 60
    for index, frame in zip([0, 7, clip.total - 1], clip.frames([0, 7, clip.total - 1]), strict=True):
        np.testing.assert_array_equal(np.asarray(frame), every[index])


#: a, b, c, d of the matrix in a track header, in 1/65536: turned clockwise by so many degrees
TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@pytest.mark.parametrize("degrees", TURNS)
def test_rotation_of_the_file_is_applied(degrees: int, film: Path, tmp_path: Path) -> None:
    whole = bytearray(film.read_bytes())
    at = whole.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of other fields
    a, b, c, d = TURNS[degrees]
    width, height = (WIDE, TALL) if degrees % 180 == 0 else (TALL, WIDE)
    x, y = {0: (0, 0), 90: (TALL, 0), 180: (WIDE, TALL), 270: (0, WIDE)}[degrees]
    fixed = [value << 16 for value in (a, b)] + [0] + [value << 16 for value in (c, d)] + [0]
    numbers = [*fixed, x << 16, y << 16, 1 << 30]
    whole[at : at + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    path = tmp_path / "turned.mp4"
    path.write_bytes(whole)
    clip = clip_from(path)
    assert clip.size == (width, height)
    (found,) = clip.frames([30])
    np.testing.assert_array_equal(np.asarray(found), np.rot90(decoded(film)[30], -degrees // 90))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations(kind: str, tmp_path: Path) -> None:
    frames = moving(12)
    path = tmp_path / f"film.{kind.lower()}"
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(path, kind, save_all=True, append_images=pictures[1:], duration=[40] * 6 + [160] * 6)
    every = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(path))])
    assert len(every) == 12
    clip = clip_from(path)
    assert (clip.total, clip.fps, clip.size) == (12, pytest.approx(10), (WIDE, TALL))
    for source in (path, path.read_bytes()):
        found = frames_from(source, [0, 5, 11, 2])
        np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in found]), every[[0, 5, 11, 2]])
    with pytest.raises(VideoError, match="cannot be read from its start"):
        clip_from(Image.open(path))
    if kind == "PNG":
        np.testing.assert_array_equal(every, frames)


def test_a_gif_without_durations_shows_ten_frames_a_second(tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame) for frame in moving(4)]
    pictures[0].save(tmp_path / "film.gif", save_all=True, append_images=pictures[1:])
    assert clip_from(tmp_path / "film.gif").fps == pytest.approx(10)


def test_transparent_frames_are_laid_over_white(tmp_path: Path) -> None:
    empty = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    empty.save(
        tmp_path / "film.webp", save_all=True, append_images=[Image.new("RGBA", (20, 10), "blue")], lossless=True
    )
    first, second = frames_from(tmp_path / "film.webp", [0, 1])
    assert (first.getpixel((3, 3)), second.getpixel((3, 3))) == ((255, 255, 255), (0, 0, 255))


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    frames = moving(12)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"Frame{index}{'.PNG' if index % 2 else '.png'}")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"no picture either")
    (tmp_path / "folder").mkdir()
    for source in (tmp_path, str(tmp_path)):
        clip = clip_from(source)
        assert (clip.total, clip.fps) == (12, None)
        np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in clip.frames(range(12))]), frames)


def test_lists_and_arrays_are_equal(tmp_path: Path) -> None:
    frames = moving(5)
    Image.fromarray(frames[1]).save(tmp_path / "1.png")
    mixed = [frames[0], tmp_path / "1.png", Image.fromarray(frames[2]), str(tmp_path / "1.png"), frames[4]]
    wanted = pixels_from_videos([frames[[0, 1, 2, 1, 4]]], qwen_model()).pixel_values
    for source in (mixed, tuple(mixed), frames[[0, 1, 2, 1, 4]].astype(np.float32) / 255):
        np.testing.assert_array_equal(pixels_from_videos([source], qwen_model()).pixel_values, wanted)


@pytest.mark.parametrize("model", [qwen_model(), video_llava()], ids=["pairs", "frames"])
def test_a_picture_is_a_clip_that_stands_still(model: ModelSpec, tmp_path: Path) -> None:
    image = Image.fromarray(data.chelsea())
    image.save(tmp_path / "photo.png")
    wanted = pixels_from_videos([np.stack([np.asarray(image)] * len(range(8)))[:1]], model)
    for source in (image, tmp_path / "photo.png", [image]):
        batch = pixels_from_videos([source], model)
        np.testing.assert_array_equal(batch.pixel_values, wanted.pixel_values)
        assert {region.frame for region in batch.layouts[0].regions} == {0}
    assert len(wanted.layouts[0].regions) == (8 if model.video.kind == "frames" else 1)


# ------------------------------------------------------------------------------------------------------ refusals


def test_nothing_to_see(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="there is no video"):
        pixels_from_videos([], qwen_model())
    with pytest.raises(VideoError, match="has no frames"):
        clip_from([])
    with pytest.raises(VideoError, match="has no frames"):
        clip_from(np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(VideoError, match="holds no pictures"):
        clip_from(tmp_path)
    with pytest.raises(VideoError, match=r"nothing\.mp4' does not exist"):
        clip_from(tmp_path / "nothing.mp4")
    with pytest.raises(VideoError, match="does not exist"):
        clip_from("https://example.org/film.mp4")
    with pytest.raises(UsageError, match="takes no videos"):
        pixels_from_videos([moving(2)], next_model())


def test_what_is_no_video(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video" * 500)
    with pytest.raises(VideoError, match="not a video that can be read") as caught:
        clip_from(text)
    assert "MKV" in caught.value.hint
    with pytest.raises(VideoError, match="not a video that can be read"):
        clip_from(b"")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
        sound.writeframes(bytes(16000))
    with pytest.raises(VideoError, match="not a video that can be read"):
        clip_from(tmp_path / "sound.wav")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="has no video in it"):
        clip_from(tmp_path / "sound.mp4")
    with pytest.raises(VideoError, match=r"shape \(8, 8, 3\)"):
        clip_from(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(VideoError, match="cannot be a int"):
        clip_from(7)  # type: ignore[arg-type]


def test_lists_of_other_files_are_refused(film: Path, tmp_path: Path) -> None:
    """FFmpeg would open what such files name."""
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{film}\n#EXT-X-ENDLIST\n")
    concat = tmp_path / "list.txt"
    concat.write_text(f"ffconcat version 1.0\nfile '{film}'\n")
    for path in (playlist, concat):
        with pytest.raises(VideoError, match="not a video that can be read"):
            clip_from(path)


@pytest.mark.parametrize("ending", ["mp4", "fast.mp4", "mkv", "avi"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_truncated_files(ending: str, share: float, tmp_path: Path) -> None:
    codec = "mpeg4" if ending == "avi" else "libx264"
    path = write_video(tmp_path / f"film.{ending}", moving(60), codec=codec, fast=ending == "fast.mp4")
    whole = path.read_bytes()
    for source in (path, whole):
        assert len(frames_from(source, [0, 59])) == 2
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(VideoError, match=r"truncated|cannot be decoded|not a video"):
        frames_from(path, [0, 59])


def test_damaged_data(film: Path) -> None:
    whole = bytearray(film.read_bytes())
    start = whole.index(b"mdat") + 4
    whole[start + 1000 : start + 9000] = np.random.default_rng(0).bytes(8000)
    with pytest.raises(VideoError, match="damaged"):
        frames_from(bytes(whole), list(range(60)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_truncated_animations(kind: str) -> None:
    pictures = [Image.fromarray(frame) for frame in moving(12)]
    stream = io.BytesIO()
    pictures[0].save(stream, kind, save_all=True, append_images=pictures[1:], duration=40)
    whole = stream.getvalue()
    with pytest.raises(VideoError, match=r"truncated|not a video"):
        frames_from(whole[: len(whole) // 2], [0, 11])


def test_a_damaged_picture_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="is not an image"):
        clip_from(tmp_path)


def test_frames_of_different_sizes() -> None:
    frames = [np.zeros((8, 9, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)]
    with pytest.raises(VideoError, match="frame 1 has 8 x 8 pixels, the first 9 x 8"):
        pixels_from_videos([frames], qwen_model())


def test_limits(film: Path, tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame) for frame in moving(4)]
    pictures[0].save(tmp_path / "film.gif", save_all=True, append_images=pictures[1:])
    for source in (film, tmp_path / "film.gif", moving(4), pictures):
        with pytest.raises(ImageError, match=f"{WIDE} x {TALL} pixels are more than 1,000"):
            clip_from(source, max_pixels=1000)
        with pytest.raises(VideoError, match=r"is too long.*more than 3"):
            pixels_from_videos([source], qwen_model(), max_frames=3)
        with pytest.raises(ImageError, match="more than 1,000"):
            pixels_from_videos([source], qwen_model(), max_pixels=1000)


def test_too_thin_frames() -> None:
    with pytest.raises(VideoError, match="too thin: 2 x 500") as caught:
        pixels_from_videos([np.zeros((2, 500, 2, 3), np.uint8)], qwen_model())
    assert "200 times" in caught.value.hint
    assert len(pixels_from_videos([np.zeros((2, 500, 2, 3), np.uint8)], video_llava())) == 1


def test_pyav_is_named_where_it_is_missing(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError) as caught:
        clip_from(film)
    assert 'pip install "holov-export[video]"' in caught.value.hint
    pictures = [Image.fromarray(frame) for frame in moving(4)]
    pictures[0].save(tmp_path / "film.gif", save_all=True, append_images=pictures[1:])
    assert len(frames_from(tmp_path / "film.gif", [0, 3])) == 2
