"""Image files: their size from the header, their pixels as an RGB tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from detdistill.config import UserError

IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2",
    ".avif",
})  # fmt: skip
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises
READERS = 16  # threads: reading headers and small files waits for the disk, not for the processor
_EXIF_ORIENTATION, _EXIF_TURNED = 0x0112, (5, 6, 7, 8)


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


def labels_beside(images: Path) -> Path:
    """The folder of labels beside one of images: the last ``images`` in its path replaced by ``labels``.

    Where the path has no such part it is the folder of the images itself.
    """
    parts = list(images.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def image_sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) as people see the image, and as the pixels are stored, from the file's header alone.

    They differ where the EXIF orientation lays the image on its side, as telephones do.

    Raises:
        UserError: the file is missing or its header is no image's.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            exif = Image.Exif()
            # Not image.getexif(): for a PNG it would decode the pixels.
            exif.load(image.info.get("exif") or b"")
    except FileNotFoundError:
        raise UserError(f"{path}: no such image; restore it or drop it from the annotations") from None
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except UNREADABLE as error:
        raise UserError(f"{path}: not a readable image ({error}); restore it or drop it") from None
    stored = (height, width)
    turned = exif.get(_EXIF_ORIENTATION) in _EXIF_TURNED
    return (width, height) if turned else stored, stored


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Decode an image to (3, H, W) uint8 RGB: grey, palette, alpha and 16-bit images are converted.

    The EXIF orientation is applied, unless only the stored orientation has the ``size`` (height, width) that
    the annotations declare: then they were drawn on the stored pixels.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it or drop it") from None
    if not data:
        raise UserError(f"{path}: an empty file; restore the image or drop it from the annotations")
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image = _decode(encoded, path, apply_orientation=True)
    if size is not None and tuple(image.shape[1:]) != size and tuple(image.shape[:0:-1]) == size:
        stored = _decode(encoded, path, apply_orientation=False)
        image = stored if tuple(stored.shape[1:]) == size else image
    return image


def _decode(encoded: Tensor, path: Path, apply_orientation: bool) -> Tensor:
    if bytes(encoded[8:12].tolist()) == b"WEBP":  # its EXIF orientation is nothing to torchvision
        return _decode_with_pillow(path, apply_orientation)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torchvision points to TorchCodec
            image = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=apply_orientation)
    except RuntimeError:  # a format that torchvision does not read: BMP, TIFF, …; or a broken file
        return _decode_with_pillow(path, apply_orientation)
    if image.dtype == torch.uint16:
        return (image.to(torch.int32) >> 8).to(torch.uint8)
    # An animated GIF comes as (frames, 3, H, W).
    return image[0] if image.ndim == 4 else image


def _decode_with_pillow(path: Path, apply_orientation: bool) -> Tensor:
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened) if apply_orientation else opened
            if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                image = Image.fromarray(grey)
            elif image.mode in ("I", "F"):
                _refuse_unknown_range(image, path)
            pixels = np.array(image.convert("RGB"))
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be decoded ({error}); restore the image or drop it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _refuse_unknown_range(image: Image.Image, path: Path) -> None:
    """Numbers of 32 bits are taken only where they are those of 8: Pillow would cut off all others."""
    low, high = image.getextrema()
    if low < 0 or high > 255 or (image.mode == "F" and high <= 1):  # type: ignore[operator]
        raise UserError(f"{path}: has values from {low:g} to {high:g}; save it with 8 or 16 bits a pixel")


def _too_large(path: Path) -> UserError:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
    return UserError(f"{path}: has more than {limit} million pixels; cut it, and its boxes, into tiles")
