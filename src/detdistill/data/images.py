"""Image files: their size from the header, their pixels as an RGB tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from detdistill.data.text import require_regular
from detdistill.errors import UserError

IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2",
    ".avif",
})  # fmt: skip
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises
READERS = 16  # threads: reading headers and small files waits for the disk, not for the processor
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # tags


def is_image(path: Path) -> bool:
    """Whether the name is that of an image (and not of a Mac's shadow file, ``._name.jpg``)."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._")


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder and its subfolders; through links to folders, too, where ``rglob`` does not go."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(here, name) for name in names)


def find_images(source: Path) -> list[Path]:
    """The image itself, or all images of a folder and its subfolders, sorted.

    Raises:
        UserError: there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such image or folder")
    found = sorted(path for path in files_below(source) if is_image(path) and path.is_file())
    if not found:
        raise UserError(f"{source}: no images in this folder; give a folder of JPEG, PNG or other images")
    return found


def image_sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) as people see the image, and as the pixels are stored, from the file's header alone.

    They differ where the orientation tag turns the image by a quarter, as phones do.

    Raises:
        UserError: the file is missing or its header is no image's.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            stored, orientation = _header(file, path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return (stored[::-1] if _TURNS[orientation].quarter else stored), stored


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Decode an image to (3, H, W) uint8 RGB: gray, palette, alpha and 16-bit images are converted.

    The orientation tag is applied as Pillow's ``exif_transpose`` does, unless only the stored orientation has
    the ``size`` (height, width) that the annotations declare: then they were drawn on the stored pixels.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    try:
        require_regular(path)
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    if not data:
        raise UserError(f"{path}: an empty file; restore the image or drop it from the annotations")
    (height, width), orientation = _header(BytesIO(data), path)  # an image bomb ends here, before its pixels
    pixels_CHW = _decode(data, path)
    turn = _TURNS[orientation]
    if turn.quarter and size == (height, width) != (width, height):
        return pixels_CHW
    if turn.quarter:
        pixels_CHW = pixels_CHW.transpose(1, 2)
    return pixels_CHW.flip(turn.flips) if turn.flips else pixels_CHW


class _Turn(NamedTuple):
    """From stored pixels (C, H, W) to upright ones: swap H and W, then flip these dimensions."""

    quarter: bool
    flips: tuple[int, ...]


_TURNS = {
    1: _Turn(False, ()), 2: _Turn(False, (2,)), 3: _Turn(False, (1, 2)), 4: _Turn(False, (1,)),
    5: _Turn(True, ()), 6: _Turn(True, (2,)), 7: _Turn(True, (1, 2)), 8: _Turn(True, (1,)),
}  # fmt: skip
_BACK = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270} | {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 7: Image.Transpose.TRANSVERSE,
}  # fmt: skip


def _header(file: BinaryIO, path: Path) -> tuple[tuple[int, int], int]:
    """(height, width) of the stored pixels, and the orientation tag, 1 where there is none that means anything.

    The one place that decides how an image is turned. Metadata that cannot be read counts as none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
            with Image.open(file) as image:
                orientation = _orientation(image, file)
                width, height = _stored_size(image)
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except Exception as error:
        # Pillow may refuse a file for its metadata: what torchvision decodes is an image all the same.
        file.seek(0)
        pixels_CHW = _decode_with_torchvision(file.read())
        if pixels_CHW is None:
            raise UserError(f"{path}: not a readable image ({error}); restore it or drop it") from None
        return (pixels_CHW.shape[1], pixels_CHW.shape[2]), 1
    return (height, width), orientation


def _orientation(image: Image.Image, file: BinaryIO) -> int:
    try:
        if isinstance(image, TiffImageFile):
            value = image.tag_v2.get(ExifTags.Base.Orientation, 1)
        elif isinstance(image, PngImageFile) and not _metadata_follows_pixels(file):
            # Not its own getexif, which decodes the pixels to look for metadata behind them.
            value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        else:
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the pixels as they are stored; of a TIFF Pillow has turned its own."""
    if isinstance(image, TiffImageFile):
        return image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
    return image.size


def _metadata_follows_pixels(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF or text chunks after its first pixels; reads the chunks' headers alone."""
    before = file.tell()
    try:
        file.seek(8)
        seen_pixels = False
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if seen_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            seen_pixels = seen_pixels or kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(before)


def _decode(data: bytes, path: Path) -> Tensor:
    """The stored pixels, (3, H, W) uint8."""
    is_webp = data[8:12] == b"WEBP"  # of an alpha channel torchvision and Pillow make different colors
    pixels_CHW = None if is_webp else _decode_with_torchvision(data)
    return _decode_with_pillow(data, path) if pixels_CHW is None else pixels_CHW


def _decode_with_torchvision(data: bytes) -> Tensor | None:
    """The stored pixels, (3, H, W) uint8; None of a format that torchvision does not read or a broken file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torchvision points to TorchCodec
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            pixels = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=False)
    except (RuntimeError, ValueError):
        return None
    if pixels.dtype == torch.uint16:
        return (pixels.to(torch.int32) >> 8).to(torch.uint8)
    # An animated GIF comes as (frames, 3, H, W).
    return pixels[0] if pixels.ndim == 4 else pixels


def _decode_with_pillow(data: bytes, path: Path) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data)) as opened:
                image = _as_stored(opened)
        if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
            gray = (np.asarray(image) >> 8).astype(np.uint8)
            image = Image.fromarray(gray)
        elif image.mode in ("I", "F"):
            _refuse_unknown_range(image, path)
        pixels = np.array(image.convert("RGB"))
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be decoded ({error}); restore the image or drop it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _as_stored(image: Image.Image) -> Image.Image:
    """The loaded image, its pixels as they are stored: those of a TIFF Pillow turns when it loads them."""
    before = _orientation(image, BytesIO()) if isinstance(image, TiffImageFile) else 1
    image.load()
    turned = before in _BACK and ExifTags.Base.Orientation not in image.getexif()
    return image.transpose(_BACK[before]) if turned else image


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such image; restore it or drop it from the annotations")
    return UserError(f"{path}: cannot be read ({error.strerror}); restore it or drop it")


def _refuse_unknown_range(image: Image.Image, path: Path) -> None:
    """Numbers of 32 bits are taken only where they are those of 8: Pillow would cut off all others."""
    low, high = image.getextrema()
    if low < 0 or high > 255 or (image.mode == "F" and high <= 1):  # type: ignore[operator]
        raise UserError(f"{path}: has values from {low:g} to {high:g}; save it with 8 or 16 bits a pixel")


def _too_large(path: Path) -> UserError:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
    return UserError(f"{path}: has more than {limit} million pixels; cut it, and its boxes, into tiles")
