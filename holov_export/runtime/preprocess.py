"""Pictures to pixels: the arithmetic of Hugging Face's CLIP and LLaVA image processors with Pillow and numpy alone.

Source: transformers 5.23 image_processing_backends.py (PilBackend) and image_transforms.py; tests compare bit by bit.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from holov_export.errors import ImageError
from holov_export.spec import ImageSpec
from holov_export.tensors import CropBox, PixelBatch

ImageSource = str | Path | bytes | Image.Image | npt.NDArray[np.generic]

#: a picture with more pixels is refused before it is decoded: 100 M pixels are 300 MB of RGB
MAX_PIXELS = 100_000_000
#: Pillow's readers for these run in this process; EPS would start Ghostscript on a stranger's file
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "QOI")
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
#: a resized picture above this is never made whole (a 1 x 9000 strip would be resized to 336 x 3,024,000)
_WHOLE_RESIZE_PIXELS = 64_000_000
_WHITE = (255, 255, 255, 255)


def image_from(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB picture.

    Args:
        source: a path, the bytes of an image file, a Pillow image, or an array [H, W], [H, W, 1], [H, W, 3] or
            [H, W, 4] of uint8, uint16 or floats in 0..1.
        max_pixels: refuse larger pictures, from the header, before anything is decoded.

    The EXIF rotation is applied, as transformers' `load_image` does (its image processors do not). Transparency is
    laid over white, as in transformers. 16-bit greys are scaled to 8 bits; Pillow's own conversion would clip them to
    white. Of an animation the first frame is used; a caller's Pillow image stays at the frame where it stands.

    Raises:
        ImageError: missing, not an image, truncated, empty or too large.
    """
    name = _name_of(source)
    if isinstance(source, (str, Path, bytes)):
        image = _opened(source, name)
    elif isinstance(source, Image.Image):
        image = source
    else:
        image = _image_from_array(source)
    _check_size(image.width, image.height, name, max_pixels)
    try:
        return _rgb(_upright(_first_frame(image)))
    except Exception as error:  # Pillow's readers let out whatever their parsers meet in a broken file
        raise ImageError(f"{name} cannot be decoded: {error}.", hint="The file is truncated or damaged.") from error


def _first_frame(image: Image.Image) -> Image.Image:
    """The image, decoded; a copy of the first frame if it is an animation that stands at another one."""
    frame = image.tell()
    if frame == 0:
        image.load()
        return image
    image.seek(0)
    try:
        return image.copy()
    finally:
        image.seek(frame)


def _name_of(source: ImageSource) -> str:
    if isinstance(source, (str, Path)):
        return f"'{source}'"
    return "the image" if not isinstance(source, bytes) else f"the image ({len(source)} bytes)"


def _opened(source: str | Path | bytes, name: str) -> Image.Image:
    """Read the header only."""
    Image.init()
    formats = [kind for kind in FORMATS if kind in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked right after
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist.") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory, not an image file.") from None
    except PermissionError:
        raise ImageError(f"{name} cannot be read: permission denied.") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {error}") from error
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image.", hint=f"Formats: {', '.join(formats)}.") from None
    except Exception as error:  # see image_from
        raise ImageError(f"{name} cannot be read as an image: {error}.") from error


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty: {width} x {height} pixels.")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is too large: {width} x {height} pixels are more than {max_pixels:,}.", hint="Scale it down."
        )


def _image_from_array(array: npt.NDArray[np.generic]) -> Image.Image:
    if not isinstance(array, np.ndarray):
        raise ImageError(f"an image cannot be a {type(array).__name__}.", hint="Give a path, bytes, Pillow or numpy.")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"an image array has shape {array.shape}.", hint="Expected [H, W] or [H, W, 1, 3 or 4].")
    if array.size == 0:
        raise ImageError(f"the image is empty: its array has shape {array.shape}.")
    grey = array.ndim == 3 and array.shape[2] == 1
    return Image.fromarray(_bytes_from_levels(array[:, :, 0] if grey else array))


def _bytes_from_levels(array: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """uint8 as it is, uint16 divided by 257, floats in 0..1 times 255, other integers within 0..255 as they are."""
    if array.dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    if array.dtype == np.uint16:
        return np.round(array.astype(np.float32) / 257).astype(np.uint8)
    values = array.astype(np.float64)
    low, high = float(np.min(values)), float(np.max(values))
    top = 1 if np.issubdtype(array.dtype, np.floating) or array.dtype == np.bool_ else 255
    if not (low >= 0 and high <= top):  # also true for NaN
        raise ImageError(f"an image array of {array.dtype} holds values in {low:g}..{high:g}, expected 0..{top}.")
    return np.round(values * (255 / top)).astype(np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is common and no reason to refuse a photograph
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB.

    Source of the white background: transformers 5.23 image_transforms.convert_to_rgb.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (modes I;16*, and I, which older Pillow gives to 16-bit PNG) or of floats to 8 bits."""
    levels = np.asarray(image, dtype=np.float64)
    high = float(levels.max())
    if image.mode == "F":
        scale = 255.0 if high <= 1 else 1.0
    else:
        scale = 1 / 257 if image.mode.startswith("I;16") or high > 255 else 1.0
    return Image.fromarray(np.clip(np.round(levels * scale), 0, 255).astype(np.uint8))


def pixels_from_images(images: Sequence[ImageSource], spec: ImageSpec, *, max_pixels: int = MAX_PIXELS) -> PixelBatch:
    """Preprocess pictures as the model's own image processor would.

    Returns:
        float32 [B, 3, H, W] with the part of each upright original that it shows.

    Raises:
        ImageError: a picture is refused (see `image_from`), there is none, or they end up of different sizes.
    """
    if len(images) == 0:
        raise ImageError("there is no image.")
    table = _normalisation_table(spec)
    planes, boxes, sizes = [], [], []
    for source in images:
        image = image_from(source, max_pixels=max_pixels)
        pixels, box = _resized_and_cropped(image, spec, max_pixels)
        planes.append(np.stack([table[channel][pixels[:, :, channel]] for channel in range(3)]))
        boxes.append(box)
        sizes.append(image.size)
    if len({plane.shape for plane in planes}) > 1:
        raise ImageError("the images have different sizes after preprocessing.", hint="Give them one at a time.")
    return PixelBatch(np.stack(planes), tuple(boxes), tuple(sizes))


def _normalisation_table(spec: ImageSpec) -> npt.NDArray[np.float32]:
    """[3, 256]: the normalised value of each level. Rounded where transformers rounds, so the bits are the same."""
    levels = (np.arange(256, dtype=np.float64) * spec.rescale_factor).astype(np.float32)
    mean, std = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
    table: npt.NDArray[np.float32] = (levels[None, :] - mean[:, None]) / std[:, None]
    return table


def _resized_and_cropped(image: Image.Image, spec: ImageSpec, max_pixels: int) -> tuple[npt.NDArray[np.uint8], CropBox]:
    """uint8 [H, W, 3] and the part of `image` it shows."""
    pad_x = pad_y = 0
    if spec.pad_to_square and image.width != image.height:
        side = max(image.size)
        _check_size(side, side, "the image padded to a square", max_pixels)
        pad_x, pad_y = (side - image.width) // 2, (side - image.height) // 2
        red, green, blue = (int(value * 255) for value in spec.mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(image, (pad_x, pad_y))
        image = square
    width, height = _resized_size(image.width, image.height, spec)
    rows, columns = spec.crop or (height, width)
    # floor, also below zero: that is where transformers puts the padding of a picture smaller than the crop
    left, top = (width - columns) // 2, (height - rows) // 2
    pixels = _window(image, (width, height), (left, top, columns, rows), FILTERS[spec.resample])
    across, down = image.width / width, image.height / height
    box = CropBox(
        left * across - pad_x, top * down - pad_y, (left + columns) * across - pad_x, (top + rows) * down - pad_y
    )
    return pixels, box


def _resized_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """(width, height) after resizing. The longer side is truncated, not rounded, as in transformers."""
    if spec.resize_to is not None:
        return spec.resize_to[1], spec.resize_to[0]
    if spec.shortest_edge is None:
        return width, height
    short, long = min(width, height), max(width, height)
    other = int(spec.shortest_edge * long / short)
    return (spec.shortest_edge, other) if width <= height else (other, spec.shortest_edge)


def _window(
    image: Image.Image, size: tuple[int, int], window: tuple[int, int, int, int], resample: Image.Resampling
) -> npt.NDArray[np.uint8]:
    """uint8 [rows, columns, 3]: the window (left, top, columns, rows) of `image` resized to `size`, zero outside."""
    (width, height), (left, top, columns, rows) = size, window
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + columns, width), min(top + rows, height)
    if width * height <= _WHOLE_RESIZE_PIXELS:
        resized = image if image.size == size else image.resize(size, resample=resample)
        seen = np.asarray(resized)[y0:y1, x0:x1]
    else:  # the same samples, but Pillow keeps the box in float32: up to one level off
        across, down = image.width / width, image.height / height
        box = (x0 * across, y0 * down, min(x1 * across, image.width), min(y1 * down, image.height))
        seen = np.asarray(image.resize((x1 - x0, y1 - y0), resample=resample, box=box))
    pixels = np.zeros((rows, columns, 3), dtype=np.uint8)
    pixels[y0 - top : y1 - top, x0 - left : x1 - left] = seen
    return pixels
