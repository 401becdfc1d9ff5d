"""Read an image file into uint8 [H, W, C] and convert between grey and colour."""

import contextlib
import io
import struct
from collections.abc import Callable, Iterator
from os import PathLike
from typing import NamedTuple

import numpy as np
from PIL import Image

from spiking_mlp_jax.errors import InputError

# What Pillow raises on corrupt files, depending on the format.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    Image.DecompressionBombError,
)


class DamagedImageError(InputError):
    """An image that cannot be decoded."""


def read_image(path: str | PathLike[str]) -> np.ndarray:
    """Read an image file.

    Args:
      path: JPEG, PNG or anything else Pillow opens.

    Returns:
      uint8 [H, W, 1] for grey images, uint8 [H, W, 3] for all others; see `decode_image`.

    Raises:
      InputError: the file is missing or not a readable image; the message names the path.
    """
    return decode_image(*read_encoded(path))


class Encoded(NamedTuple):
    """An encoded image.

    Attributes:
      data: the bytes of a JPEG, PNG, ... file.
      where: its name in error messages.
    """

    data: bytes
    where: str


def read_encoded(path: str | PathLike[str]) -> Encoded:
    """Read an image file without decoding it.

    Raises:
      InputError: the file is missing; the message names the path.
    """
    try:
        with open(path, "rb") as file:
            return Encoded(file.read(), str(path))
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read image {path} ({reason}): give the path of an image file") from error


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decode an encoded image.

    The EXIF rotation is applied, transparent pixels become black (like padding), palette and CMYK images become RGB,
    and an animation its first frame. Grey of more than 8 bits is scaled by what its values show: 0 to 1 (floating),
    0 to 255 or 0 to 65535. Broken metadata are ignored.

    Args:
      data: the bytes of a JPEG, PNG, ... file.
      where: its name in error messages.

    Returns:
      uint8 [H, W, 1] for grey images, uint8 [H, W, 3] for all others.

    Raises:
      DamagedImageError: the bytes are not a readable image, it has far more pixels than its size explains, or values
        of another range.
    """

    def decode(data: bytes) -> np.ndarray:
        with _opened(data, where) as picture:
            picture.load()
            return _to_array(_upright(picture))

    return _tolerant(decode, data)


def pillow_array(picture: Image.Image) -> np.ndarray:
    """The pixels of a Pillow image, converted as in `decode_image`.

    Raises:
      InputError: it is not a Pillow image, or cannot be decoded.
    """
    if not isinstance(picture, Image.Image):
        raise InputError(f"an image must be a path, a Pillow image or a uint8 array, got {type(picture).__name__}")
    try:
        return _to_array(_upright(picture))
    except DamagedImageError as error:
        raise DamagedImageError(f"a Pillow image {error}") from error
    except DAMAGED as error:
        raise DamagedImageError("cannot decode a Pillow image: replace the corrupt image") from error


Box = tuple[int, int, int, int]  # top, left, height, width


def decode_crop(encoded: Encoded, choose: Callable[[int, int], Box], least: int) -> np.ndarray:
    """Decode a rectangle of an image.

    If the rectangle of a JPEG is at least 2 (4, 8) times as large as needed, the file is decoded at 1/2 (1/4, 1/8) of
    its size, which is faster: libjpeg then skips frequencies. The rectangle is rounded to multiples of 2 (4, 8) pixels.

    Args:
      encoded: the image.
      choose: function of the image's height and width to the rectangle, in pixels.
      least: minimum height and width of the result, unless the rectangle is smaller.

    Returns:
      uint8 [h, w, 1 | 3], converted as in `decode_image`: the rectangle, possibly downscaled.

    Raises:
      DamagedImageError: the bytes are not a readable image.
    """
    return _tolerant(lambda data: _decode_crop(Encoded(data, encoded.where), choose, least), encoded.data)


def _decode_crop(encoded, choose, least):
    with _opened(*encoded) as picture:
        plain = picture.format == "JPEG" and picture.mode in ("RGB", "L") and _orientation(picture) not in _UPRIGHT
        if not plain:
            image = decode_image(*encoded)
            top, left, height, width = choose(*image.shape[:2])
            return image[top : top + height, left : left + width]
        whole_width, whole_height = picture.size
        box = top, left, height, width = choose(whole_height, whole_width)
        shrink = max(factor for factor in (1, 2, 4, 8) if factor == 1 or factor * least <= min(height, width))
        if shrink > 1:
            picture.draft(picture.mode, (whole_width // shrink, whole_height // shrink))
            top, left, height, width = (value // shrink for value in box)
        cut = np.asarray(picture.crop((left, top, left + width, top + height)))
        return cut[..., None] if cut.ndim == 2 else cut


_ORIENTATION = 0x0112  # the EXIF tag of the camera's rotation
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(picture: Image.Image) -> int:
    # Broken metadata raises nearly anything, and is not broken pixels.
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _upright(picture: Image.Image) -> Image.Image:
    # Not `ImageOps.exif_transpose`, which writes all metadata again and fails where any of it is broken.
    turn = _UPRIGHT.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


# A photograph has at least 1 / 16 byte a pixel. Less is a small file that would take gigabytes.
MOST_PIXELS, MOST_PIXELS_PER_BYTE = 2**24, 16


@contextlib.contextmanager
def _opened(data: bytes, where: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS + MOST_PIXELS_PER_BYTE * len(data):
                raise DamagedImageError(f"has {width} x {height} pixels in {len(data):,} bytes: reduce or remove it")
            yield picture
    except DamagedImageError as error:
        raise DamagedImageError(f"image {where} {error}") from error
    except DAMAGED as error:
        raise DamagedImageError(f"cannot decode image {where}: replace or remove the corrupt file") from error


def _tolerant(decode: Callable[[bytes], np.ndarray], data: bytes) -> np.ndarray:
    """What a function makes of an image's bytes, or else of those that its pixels need."""
    try:
        return decode(data)
    except DamagedImageError:
        bare = _without_metadata(data)
        if bare == data:
            raise
    return decode(bare)


PNG = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def _without_metadata(data: bytes) -> bytes:
    """A PNG of the chunks that hold its pixels, a JPEG without APPn segments and comments; other data as they are.

    References: PNG specification, section 11; ISO/IEC 10918-1, table B.1.
    """
    kept = []
    if data.startswith(PNG):
        at = len(PNG)
        while at + 12 <= len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4])
            if data[at + 4 : at + 8] in PNG_PIXELS:
                kept.append(data[at:end])
            at = end
        return PNG + b"".join(kept)
    if data.startswith(b"\xff\xd8"):
        at = 2
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"", b"\xda"):  # up to the scan
            marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
            # The JFIF segment and Adobe's say how colors are coded, where they are whole.
            colors = (marker == 0xE0 and end - at >= 18) or (marker == 0xEE and end - at >= 16)
            if colors or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
                kept.append(data[at:end])
            at = end
        return b"\xff\xd8" + b"".join(kept) + data[at:]
    return data


def _to_array(picture: Image.Image) -> np.ndarray:
    mode = picture.mode
    if mode.startswith("I") or mode == "F":
        return _scaled(np.asarray(picture).astype(np.float64))[..., None]
    grey = mode in ("1", "L", "LA", "La")
    if picture.has_transparency_data:
        flat = _over_black(np.array(picture.convert("RGBA")))
        return np.ascontiguousarray(flat[..., :1]) if grey else flat
    return np.array(picture.convert("L"))[..., None] if grey else np.array(picture.convert("RGB"))


def _scaled(values: np.ndarray) -> np.ndarray:
    # Pillow's own conversion to "L" would clip. A dark image of 16 bits and one of 8 bits in a wider type look alike:
    # below 256 it would be black, so that it is taken for the latter.
    least, most = values.min(), values.max()
    if not (least >= 0 and most < 65536):  # or NaN
        raise DamagedImageError(f"holds values from {least:g} to {most:g}: save it with 8 or 16 bits")
    if most <= 1 and (values % 1).any():
        values = 255 * values
    elif most >= 256:
        return (values // 256).astype(np.uint8)
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _over_black(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)


def to_channels(image: np.ndarray, in_channels: int) -> np.ndarray:
    """Convert an image to the number of channels of a model.

    Grey to RGB repeats the channel; RGB to grey is ITU-R 601 luma, the same integers as Pillow's "L"; RGBA is
    composited over black first.

    Args:
      image: uint8 [H, W] or [H, W, C] with C = 1 (grey), 3 (RGB) or 4 (RGBA).
      in_channels: 1 or 3.

    Returns:
      uint8 [H, W, in_channels]; the input itself if it has them already.

    Raises:
      InputError: another dtype, shape or number of channels.
    """
    if in_channels not in (1, 3):
        raise InputError(f"in_channels must be 1 (grey) or 3 (RGB), got {in_channels}")
    if image.dtype != np.uint8:
        raise InputError(f"an image must have dtype uint8 (0 to 255), got {image.dtype}")
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise InputError(f"an image must have shape [height, width, 1, 3 or 4 channels], got {image.shape}")
    if image.shape[2] == 4:
        image = _over_black(image)
    if image.shape[2] == in_channels:
        return image
    if in_channels == 3:
        return np.repeat(image, 3, axis=2)
    # Fixed-point weights 0.299, 0.587, 0.114 times 2**16.
    luma = image.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32) + 0x8000
    return (luma >> 16).astype(np.uint8)[..., None]
