"""Preprocessing against transformers' own processors, and every way a picture can be wrong."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from holov_export.errors import ImageError
from holov_export.runtime import preprocess, preprocess_squares
from holov_export.runtime.preprocess import image_from, pixels_from_images
from holov_export.spec import ImageSpec

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIDE = 84
SPEC = ImageSpec(shortest_edge=SIDE, crop=(SIDE, SIDE), mean=MEAN, std=STD)


def photograph(name: str) -> Image.Image:
    if name in ("china", "flower"):
        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    return Image.fromarray(getattr(data, name)())


def clip(image: Image.Image, **settings: object) -> np.ndarray:
    options = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, **settings}
    return np.asarray(CLIPImageProcessorPil(**options)(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket", "china", "flower"])
def test_photographs_are_bit_equal_to_transformers(name: str) -> None:
    image = photograph(name)
    np.testing.assert_array_equal(pixels_from_images([image], SPEC).pixel_values, clip(image))


SIZES = [
    (1, 1),
    (1, 500),
    (500, 1),
    (300, 100),
    (100, 300),
    (84, 84),
    (85, 84),
    (83, 84),
    (337, 511),
    (40, 40),
    (85, 87),
]


@pytest.mark.parametrize("size", SIZES)
def test_any_size_is_bit_equal_to_transformers(size: tuple[int, int]) -> None:
    image = photograph("coffee").resize(size)
    batch = pixels_from_images([image], SPEC)
    np.testing.assert_array_equal(batch.pixel_values, clip(image))
    assert batch.pixel_values.dtype == np.float32
    assert batch.sizes == (size,)


@pytest.mark.parametrize("size", [(30, 90), (90, 30), (31, 84), (85, 31), (17, 18)])
def test_crop_larger_than_picture_is_padded_like_transformers(size: tuple[int, int]) -> None:
    image = photograph("coffee").resize(size)
    spec = SPEC.model_copy(update={"shortest_edge": None})
    np.testing.assert_array_equal(pixels_from_images([image], spec).pixel_values, clip(image, do_resize=False))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_resize_to_fixed_size(resample: str) -> None:
    image = photograph("chelsea")
    spec = ImageSpec(resize_to=(42, 63), resample=resample, mean=MEAN, std=STD)  # type: ignore[arg-type]
    wanted = clip(
        image, size={"height": 42, "width": 63}, do_center_crop=False, resample=int(preprocess.FILTERS[resample])
    )
    np.testing.assert_array_equal(pixels_from_images([image], spec).pixel_values, wanted)


@pytest.mark.parametrize("size", [(120, 51), (51, 120), (50, 50), (1, 90)])
def test_pad_to_square_is_bit_equal_to_llava(size: tuple[int, int]) -> None:
    image = photograph("rocket").resize(size)
    processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    batch = pixels_from_images([image], SPEC.model_copy(update={"pad_to_square": True}))
    np.testing.assert_array_equal(batch.pixel_values, np.asarray(processor(image, return_tensors="np")["pixel_values"]))
    width, height = size
    half = abs(width - height) // 2
    assert (batch.boxes[0].left, batch.boxes[0].top) == ((0, -half) if width > height else (-half, 0))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_are_equal_to_transformers(mode: str) -> None:
    image = photograph("chelsea").resize((100, 90))
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    np.testing.assert_array_equal(pixels_from_images([image], SPEC).pixel_values, clip(image))


def test_transparent_palette_is_equal_to_transformers() -> None:
    image = photograph("coffee").resize((100, 90)).quantize(8)
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=2)
    wanted = clip(Image.open(io.BytesIO(stream.getvalue())))
    assert not np.array_equal(wanted, clip(image.convert("RGB"))), "the transparent colour must occur"
    np.testing.assert_array_equal(pixels_from_images([stream.getvalue()], SPEC).pixel_values, wanted)


def test_sixteen_bits_are_scaled_instead_of_clipped(tmp_path: Path) -> None:
    grey = np.asarray(photograph("chelsea").convert("L"))
    path = tmp_path / "grey16.png"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert Image.open(path).mode.startswith("I")
    np.testing.assert_array_equal(np.asarray(image_from(path))[:, :, 0], grey)


def test_float_grey(tmp_path: Path) -> None:
    grey = np.asarray(photograph("chelsea").convert("L"))
    path = tmp_path / "grey.tiff"
    Image.fromarray(grey.astype(np.float32) / 255).save(path)
    np.testing.assert_array_equal(np.asarray(image_from(path))[:, :, 0], grey)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_rotation_is_applied(orientation: int) -> None:
    image = photograph("coffee").resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    upright = image_from(stream.getvalue())
    turns = {1: 0, 3: 180, 6: 270, 8: 90}[orientation]
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(image.rotate(turns, expand=True)))
    assert pixels_from_images([stream.getvalue()], SPEC).sizes == (upright.size,)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0MM\0*\0\0\0\x08"]
)
def test_damaged_exif_is_no_reason_to_refuse(exif: bytes) -> None:
    image = photograph("coffee").resize((60, 40))
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(image_from(stream.getvalue())), np.asarray(image))


def test_first_frame_of_an_animation() -> None:
    first, second = Image.new("RGB", (9, 9), (255, 0, 0)), Image.new("RGB", (9, 9), (0, 255, 0))
    stream = io.BytesIO()
    first.save(stream, "GIF", save_all=True, append_images=[second])
    assert image_from(stream.getvalue()).getpixel((4, 4)) == (255, 0, 0)
    opened = Image.open(io.BytesIO(stream.getvalue()))
    opened.seek(1)
    assert image_from(opened).getpixel((4, 4)) == (255, 0, 0)
    assert opened.tell() == 1, "it is the caller's"
    assert opened.convert("RGB").getpixel((4, 4)) == (0, 255, 0)


def test_the_callers_image_is_not_changed() -> None:
    image = photograph("coffee").convert("RGBA")
    image.getexif()[0x0112] = 6
    image.info["comment"] = "mine"
    before = image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif())
    seen = image_from(image)
    assert seen.size == image.size[::-1]
    assert (image.mode, image.size, image.tobytes(), dict(image.info), dict(image.getexif())) == before
    plain = photograph("coffee")
    image_from(plain).paste((0, 0, 0), (0, 0, 50, 50))
    assert plain == photograph("coffee"), "the picture that comes back is not the caller's own"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int64"])
def test_arrays(dtype: str) -> None:
    image = np.asarray(photograph("coffee"))
    scaled = {"uint8": image, "uint16": image.astype(np.uint16) * 257, "float32": image.astype(np.float32) / 255}
    array = scaled.get(dtype, image.astype(np.int64))
    np.testing.assert_array_equal(np.asarray(image_from(array)), image)
    np.testing.assert_array_equal(np.asarray(image_from(array[:, :, :1])), np.repeat(image[:, :, :1], 3, axis=2))
    np.testing.assert_array_equal(np.asarray(image_from(array[:, :, 0])), np.repeat(image[:, :, :1], 3, axis=2))


def test_crop_box_of_a_wide_photograph() -> None:
    image = photograph("coffee")  # 600 x 400: the middle 400 columns are seen
    batch = pixels_from_images([image, image.resize((400, 600))], SPEC)
    wide, tall = batch.boxes
    assert (wide.left, wide.top, wide.right, wide.bottom) == pytest.approx((100, 0, 500, 400))
    assert (tall.left, tall.top, tall.right, tall.bottom) == pytest.approx((0, 100, 400, 500))
    assert batch.sizes == ((600, 400), (400, 600))


def test_crop_box_of_a_padded_picture() -> None:
    spec = SPEC.model_copy(update={"shortest_edge": None})
    (box,) = pixels_from_images([photograph("coffee").resize((40, 61))], spec).boxes
    assert (box.left, box.top, box.right, box.bottom) == (-22, -12, 62, 72)


def test_long_strips_are_not_resized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph("coffee").resize((300, 20))
    whole = pixels_from_images([image], SPEC).pixel_values
    monkeypatch.setattr(preprocess_squares, "_WHOLE_RESIZE_PIXELS", 1000)
    part = pixels_from_images([image], SPEC).pixel_values
    assert np.abs(whole - part).max() <= 1.01 / 255 / min(STD)
    strip = Image.new("RGB", (1, 3_000_000), (200, 100, 50))
    assert pixels_from_images([strip], SPEC).pixel_values.shape == (1, 3, SIDE, SIDE)


def test_batch_equals_singles() -> None:
    images = [photograph(name) for name in ("coffee", "rocket")]
    batch = pixels_from_images(images, SPEC)
    assert len(batch) == 2
    for index, image in enumerate(images):
        single = pixels_from_images([image], SPEC)
        np.testing.assert_array_equal(batch.pixel_values[index], single.pixel_values[0])
        assert batch.boxes[index] == single.boxes[0]


# ------------------------------------------------------------------------------------------------------ refusals


def jpeg_bytes() -> bytes:
    stream = io.BytesIO()
    photograph("coffee").save(stream, "JPEG")
    return stream.getvalue()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nothing\.png' does not exist"):
        image_from(tmp_path / "nothing.png")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a directory"):
        image_from(str(tmp_path))


def test_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    path.write_text("no picture")
    with pytest.raises(ImageError, match="is not an image"):
        image_from(path)
    with pytest.raises(ImageError, match="is not an image"):
        image_from(b"")


def test_postscript_is_refused() -> None:
    with pytest.raises(ImageError, match="is not an image"):
        image_from(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_jpeg(share: float) -> None:
    whole = jpeg_bytes()
    with pytest.raises(ImageError, match=r"cannot be decoded|is not an image|cannot be read"):
        image_from(whole[: int(len(whole) * share)])


def test_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.new("1", (12_000, 11_000)).save(stream, "PNG")
    small = jpeg_bytes()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="12000 x 11000 pixels are more than 100,000,000"):
        image_from(stream.getvalue())
    with pytest.raises(ImageError, match="more than 1,000"):
        image_from(small, max_pixels=1000)


def test_padded_bomb_is_refused() -> None:
    with pytest.raises(ImageError, match="padded to a square is too large"):
        pixels_from_images([Image.new("L", (20_000, 1))], SPEC.model_copy(update={"pad_to_square": True}))


def test_empty_pictures() -> None:
    with pytest.raises(ImageError, match="empty"):
        image_from(Image.new("RGB", (0, 5)))
    with pytest.raises(ImageError, match="empty"):
        image_from(np.zeros((0, 5, 3), np.uint8))
    with pytest.raises(ImageError, match="there is no image"):
        pixels_from_images([], SPEC)


def test_arrays_that_are_no_pictures() -> None:
    with pytest.raises(ImageError, match=r"shape \(3, 8, 8\)"):
        image_from(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ImageError, match=r"expected 0\.\.1"):
        image_from(np.full((8, 8, 3), 128.0))
    with pytest.raises(ImageError, match=r"expected 0\.\.1"):
        image_from(np.full((8, 8, 3), np.nan))
    with pytest.raises(ImageError, match=r"expected 0\.\.255"):
        image_from(np.full((8, 8, 3), 300))
    with pytest.raises(ImageError, match="cannot be a list"):
        image_from([[1]])  # type: ignore[arg-type]


def test_different_sizes_after_preprocessing() -> None:
    spec = SPEC.model_copy(update={"crop": None})
    with pytest.raises(ImageError, match="different sizes"):
        pixels_from_images([photograph("coffee"), photograph("astronaut")], spec)
