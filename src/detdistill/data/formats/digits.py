"""The built-in dataset ``digits``: handwritten digits on photographs, drawn in seconds, without any download.

The digits are scikit-learn's (1,797 of 8×8 pixels, UCI "Optical Recognition of Handwritten Digits"), the
photographs those that scikit-learn ships (china.jpg, flower.jpg). Training and evaluation share neither a
digit nor a photograph's region. Boxes and masks are exact: they come from the pixels that are drawn. Strokes
and blobs that are no digits lie about, and noise covers everything. A digit in a mirror is no digit, so train
without flips.

The result is a COCO dataset on disk, read like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from detdistill.data.masks import encode_mask
from detdistill.errors import UserError
from detdistill.recipe import DataConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_VERSION = 2  # raise it when the pictures change, so that a cache of older ones is not taken for them
_TRAIN_DIGITS = 1300  # of 1,797; the others are for evaluation
_TRAIN_PART = 0.6  # of each photograph's width
_SMALLEST, _LARGEST = 24, 80  # height of a digit's cell on a 160 px image
_MOST_DIGITS = 8
_MOST_HIDDEN = 0.3  # share of a digit that later ones may cover
_LEAST_CONTRAST = 55  # of 255, between a digit's luma and that of what lies under it
_LUMA = np.array([0.299, 0.587, 0.114])


def digits_root(config: DataConfig) -> Path:
    """The folder of the digits that a recipe asks for; they are drawn if they are not there yet.

    ``data.root`` if given, else a folder below ``DETDISTILL_CACHE`` or ``~/.cache/detdistill``.

    Raises:
        UserError: ``data.root`` holds something else, or cannot be written.
    """
    wanted = {
        "version": _VERSION,
        "train_size": config.train_size,
        "val_size": config.val_size,
        "image_size": config.image_size,
        "seed": 0,
    }
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    cache_folder = Path(os.environ.get("DETDISTILL_CACHE") or Path.home() / ".cache" / "detdistill")
    root = config.root or cache_folder / f"digits-{key}"
    if _marker(root) == wanted:
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root}: holds something else than these digits; give data.root a new folder")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(root.parent)
        work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written ({error.strerror}); set data.root or DETDISTILL_CACHE to another folder"
        ) from None
    try:
        lock = _locked(work / LOCK, fcntl.LOCK_SH) if fcntl is not None else None
        write_digits(work, config.train_size, config.val_size, config.image_size)
        (work / "digits.json").write_text(json.dumps(wanted))
        (work / LOCK).unlink(missing_ok=True)
        if lock is not None:
            lock.close()
        work.chmod(0o755)
        try:
            work.rename(root)  # over an empty folder at most: another process may have been quicker
        except OSError:
            if _marker(root) != wanted:
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root


def _clear_abandoned(folder: Path) -> None:
    """Delete the half-drawn sets of processes that were killed: nobody holds their lock any more."""
    for lock_file in folder.glob(f".digits*/{LOCK}") if fcntl is not None else ():
        lock = _locked(lock_file, fcntl.LOCK_EX)
        if lock is not None:
            shutil.rmtree(lock_file.parent, ignore_errors=True)
            lock.close()


def _locked(file: Path, how: int) -> IO[str] | None:
    """The opened file with its lock, which ends with the process; None where another process has it."""
    with suppress(OSError):
        opened = file.open("a", encoding="utf-8")
        try:
            fcntl.flock(opened, how | fcntl.LOCK_NB)
            return opened
        except OSError:
            opened.close()
    return None


def _marker(root: Path) -> Any:
    try:
        return json.loads((root / "digits.json").read_text())
    except (OSError, ValueError):
        return None


def write_digits(root: Path, train_size: int, val_size: int, image_size: int, seed: int = 0) -> None:
    """Draw the dataset: ``annotations/instances_{train,val}.json``, ``train/*.png``, ``val/*.png``.

    The same arguments give the same bytes. Image i does not depend on how many there are.

    Args:
        image_size: side of the square images, in pixels; digits grow with it.
    """
    for part, (name, size) in enumerate({"train": train_size, "val": val_size}.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(size):
            scene = _draw_scene(np.random.default_rng([seed, part, i]), name, image_size, seed)
            file_name = f"{i:06d}.png"
            Image.fromarray(scene.pixels_HW3).save(folder / file_name, compress_level=1)
            images.append({"id": i + 1, "file_name": file_name, "height": image_size, "width": image_size})
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                annotations.append(_annotation(len(annotations) + 1, i + 1, label, mask))
        dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": digit + 1, "name": str(digit)} for digit in range(10)],
        }
        file = root / "annotations" / f"instances_{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(dataset))


def _annotation(annotation_id: int, image_id: int, label: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": encode_mask(mask),
    }


# --- drawing ---------------------------------------------------------------------------------------------


@dataclass
class _Scene:
    pixels_HW3: NDArray[np.uint8]
    labels: list[int]
    masks: list[NDArray[np.bool_]]  # of what is visible


def _draw_scene(rng: np.random.Generator, split: str, side: int, seed: int) -> _Scene:
    canvas = _background(rng, split, side)
    masks: list[NDArray[np.bool_]] = []
    digits: list[int] = []
    for _ in range(rng.integers(0, 3)):
        _draw_distractor(rng, canvas)
    images, labels = digits_of(split, seed)
    drawn_areas: list[int] = []
    wanted = int(rng.integers(1, _MOST_DIGITS + 1))
    for _ in range(3 * wanted):  # a crowded image ends with fewer; the first always finds room
        if len(digits) == wanted:
            break
        pick = int(rng.integers(len(images)))
        stamp = _warped(rng, images[pick], side)
        top = int(rng.integers(0, side - stamp.shape[0] + 1))
        left = int(rng.integers(0, side - stamp.shape[1] + 1))
        mask = np.zeros((side, side), dtype=bool)
        mask[top : top + stamp.shape[0], left : left + stamp.shape[1]] = stamp > 0.5
        left_over = [old & ~mask for old in masks]
        tower_features = [
            rest.sum() < (1 - _MOST_HIDDEN) * area for rest, area in zip(left_over, drawn_areas, strict=True)
        ]
        if any(tower_features):
            continue
        _paste(rng, canvas[top : top + stamp.shape[0], left : left + stamp.shape[1]], stamp)
        masks = [*left_over, mask]
        digits.append(int(labels[pick]))
        drawn_areas.append(int(mask.sum()))
    noise = rng.normal(0, rng.uniform(2, 10), canvas.shape)
    return _Scene(np.clip(canvas + noise, 0, 255).astype(np.uint8), digits, masks)


@cache
def digits_of(split: str, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(D, 8, 8) strength of ink in [0, 1] and (D,) digit; those of "train" and "val" are disjoint."""
    from sklearn.datasets import load_digits  # takes a second, and only this dataset needs it

    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    chosen = order[:_TRAIN_DIGITS] if split == "train" else order[_TRAIN_DIGITS:]
    return bunch.images[chosen] / 16.0, bunch.target[chosen].astype(np.int64)


@cache
def _photographs(split: str) -> tuple[Image.Image, ...]:
    """The left part of each photograph for training, the right for evaluation."""
    from sklearn.datasets import load_sample_images

    parts = []
    for pixels in load_sample_images().images:
        cut = round(pixels.shape[1] * _TRAIN_PART)
        parts.append(Image.fromarray(pixels[:, :cut] if split == "train" else pixels[:, cut:]))
    return tuple(parts)


def _background(rng: np.random.Generator, split: str, side: int) -> NDArray[np.float64]:
    """A crop of a photograph, or of a cloudy texture, at random size, turned and recolored."""
    if rng.random() < 0.8:
        photographs = _photographs(split)
        photograph = photographs[rng.integers(len(photographs))]
    else:
        cells = int(rng.integers(2, 12))
        cloud = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        photograph = cloud.resize((256, 256), Image.Resampling.BICUBIC)
    crop = int(rng.integers(60, min(photograph.size) + 1))
    left = int(rng.integers(0, photograph.width - crop + 1))
    top = int(rng.integers(0, photograph.height - crop + 1))
    resized = photograph.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + crop, top + crop))
    pixels = np.asarray(resized, dtype=np.float64)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    pixels = np.rot90(pixels, int(rng.integers(4)))[:, :, rng.permutation(3)]
    return np.clip((pixels - 128) * rng.uniform(0.5, 1.1) + 128 + rng.uniform(-40, 40), 0, 255)


def _warped(rng: np.random.Generator, digit_88: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """The digit enlarged, turned and stretched: opacity in [0, 1], cut to what is opaque."""
    height = np.exp(rng.uniform(np.log(_SMALLEST), np.log(_LARGEST))) * side / 160
    height = min(height, 0.7 * side)
    aspect, angle, slant = rng.uniform(0.75, 1.25), np.deg2rad(rng.uniform(-20, 20)), rng.uniform(-0.2, 0.2)
    cells = 10  # the digit and a blank margin, so that it fades to nothing
    padded = Image.fromarray(np.pad(digit_88, 1).astype(np.float32) * 255)
    reach = int(np.ceil(height * 1.6))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shape = np.array([[1 / aspect, slant], [0, 1]]) @ turn * cells / height
    shift = cells / 2 - shape @ np.array([reach / 2, reach / 2])
    affine = (*shape[0], shift[0], *shape[1], shift[1])
    grown = padded.transform((reach, reach), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    # The enlarged 8×8 picture is a blur; a steep ramp gives it an edge about as sharp as the photograph's.
    opacity = np.clip((np.asarray(grown, dtype=np.float64) / 255 - 0.5) * max(2.0, height / 8) + 0.5, 0, 1)
    ink = opacity > 0.5
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _paste(rng: np.random.Generator, under: NDArray[np.float64], opacity: NDArray[np.float64]) -> None:
    """Blend a color that stands out from what lies under it, in place."""
    ink = opacity > 0.5
    ground = float((under[ink] @ _LUMA).mean())
    color = rng.uniform(0, 255, 3)
    for _ in range(20):
        if abs(float(color @ _LUMA) - ground) >= _LEAST_CONTRAST:
            break
        color = rng.uniform(0, 255, 3)
    else:
        color = np.full(3, 235.0 if ground < 128 else 20.0)
    weight = (opacity * rng.uniform(0.8, 1.0))[:, :, None]
    under[...] = under * (1 - weight) + color * weight


def _draw_distractor(rng: np.random.Generator, canvas: NDArray[np.float64]) -> None:
    """A stroke, an arc or a blob in a color of its own, in place."""
    side = canvas.shape[0]
    layer = Image.new("L", (side, side))
    draw = ImageDraw.Draw(layer)
    x, y = rng.uniform(0, side, 2)
    width, height = np.exp(rng.uniform(np.log(6), np.log(60), 2)) * side / 160
    thick = max(1, round(float(rng.uniform(1, 6)) * side / 160))
    box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    kind = rng.integers(3)
    if kind == 0:
        ends = [(x + dx, y + dy) for dx, dy in rng.uniform(-1, 1, (3, 2)) * (width, height)]
        draw.line(ends, fill=255, width=thick)
    elif kind == 1:
        start = float(rng.uniform(0, 360))
        draw.arc(box, start, start + float(rng.uniform(60, 200)), fill=255, width=thick)
    else:
        draw.ellipse(box, fill=255)
    opacity = np.asarray(layer.filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float64)[:, :, None] / 255
    opacity = opacity * rng.uniform(0.6, 1.0)
    canvas[...] = canvas * (1 - opacity) + rng.uniform(0, 255, 3) * opacity
