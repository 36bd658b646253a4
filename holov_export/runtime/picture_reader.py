"""Image files, bytes, Pillow images and arrays become upright RGB pictures; what is broken or too large is refused."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from holov_export.errors import ImageError

ImageSource = str | Path | bytes | Image.Image | npt.NDArray[np.generic]

#: a picture with more pixels is refused before it is decoded: 100 M pixels are 300 MB of RGB
MAX_PIXELS = 100_000_000
#: Pillow's readers for these run in this process; EPS would start Ghostscript on a stranger's file
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "QOI")
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
        image = opened(source, name)
    elif isinstance(source, Image.Image):
        image = source
    else:
        image = _image_from_array(source)
    check_size(image.width, image.height, name, max_pixels)
    try:
        return upright_rgb(_first_frame(image))
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


def readable_formats() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def opened(source: str | Path | bytes, name: str) -> Image.Image:
    """Read the header only.

    Raises:
        ImageError: as of `image_from`.
    """
    formats = readable_formats()
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


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Refuse what is empty or has more than `max_pixels`.

    Raises:
        ImageError: it is.
    """
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


def upright_rgb(image: Image.Image) -> Image.Image:
    """A decoded image without its EXIF rotation and transparency; the errors are Pillow's."""
    return _rgb(_upright(image))


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
