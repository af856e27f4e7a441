"""What every annotation format shares: objects become a record, and what is wrong with them a finding."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detdistill.config import UserError, nearest
from detdistill.data.masks import usable_segmentation
from detdistill.data.records import UNLABELLED, Finding, LabelCode, LabelMap, Record, Split

_ROUNDING = 1.0  # pixels by which a box may leave its image before it is worth a word


class RawObject(NamedTuple):
    """One annotated object as the file gives it; nothing is checked yet."""

    box: Sequence[float]  # xyxy, pixels
    label: int
    name: str  # how a message calls it: "annotation 17"
    ignore: bool = False
    area: float | None = None
    mask: Any = None


def make_record(
    image_id: int | str,
    path: Path,
    size: tuple[int, int],
    objects: Sequence[RawObject],
    source: Path,
    findings: list[Finding],
    with_masks: bool = True,
) -> Record:
    """Check the objects of one image, drop or clip what is bad, and pack the rest.

    Args:
        size: (height, width) of the image.
        source: the annotation file, for messages.
        findings: gets a warning for each object that is dropped or clipped.
    """
    height, width = size
    boxes_K4: NDArray[np.float64] = np.array([raw.box for raw in objects], dtype=np.float64).reshape(-1, 4)
    limits = np.array([width, height, width, height], dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        clipped_K4 = np.clip(boxes_K4, 0, limits).astype(np.float32)
        # In float32, so that what counts as empty here is empty for everybody after.
        # The area, too: that of two denormal sides is 0.
        sides_K2 = clipped_K4[:, 2:] - clipped_K4[:, :2]
        has_size_K = (sides_K2 > 0).all(axis=1) & (sides_K2.prod(axis=1) > 0)
        kept_K = np.logical_and(np.isfinite(boxes_K4).all(axis=1), has_size_K)
        overrun_K = np.abs(boxes_K4 - np.clip(boxes_K4, 0, limits)).max(axis=1, initial=0.0)
    findings += [
        _box_finding(objects[k], boxes_K4[k].tolist(), bool(kept_K[k]), size, source, image_id)
        for k in np.flatnonzero(~kept_K | (overrun_K >= _ROUNDING)).tolist()
    ]
    kept = [raw for raw, keep in zip(objects, kept_K, strict=True) if keep]
    clipped_K4 = clipped_K4[kept_K]
    sides_K2 = clipped_K4[:, 2:] - clipped_K4[:, :2]
    areas = [
        raw.area if _is_area(raw.area) else float(sides[0] * sides[1])
        for raw, sides in zip(kept, sides_K2, strict=True)
    ]
    return Record(
        image_id=image_id,
        path=path,
        height=height,
        width=width,
        boxes_K4=clipped_K4,
        labels_K=np.array([raw.label for raw in kept], dtype=np.int64),
        ignore_K=np.array([raw.ignore for raw in kept], dtype=np.bool_),
        areas_K=np.array(areas, dtype=np.float32),
        masks=tuple(usable_segmentation(raw.mask, height, width) for raw in kept) if with_masks else None,
    )


def _is_area(area: Any) -> bool:
    return isinstance(area, int | float) and math.isfinite(area) and area > 0


def _box_finding(
    raw: RawObject,
    box: Sequence[float],
    kept: bool,
    size: tuple[int, int],
    source: Path,
    image_id: int | str,
) -> Finding:
    height, width = size
    x1, y1, x2, y2 = box
    at = f"{raw.name} of image {image_id}: box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if kept:
        message = f"{at} leaves the {width}×{height} image and was clipped"
        return Finding("warning", "box clipped", source, message, "draw it inside the image")
    if not np.isfinite(box).all():
        return Finding("warning", "box not finite", source, f"{at} was dropped", "write four numbers")
    inside = min(x1, y1) >= 0 and x2 <= width and y2 <= height
    if inside or x2 <= x1 or y2 <= y1:  # inside and dropped: thinner than float32 can tell
        message = f"{at} has no size and was dropped"
        return Finding("warning", "zero-size box", source, message, "draw the box again or delete it")
    message = f"{at} lies outside the {width}×{height} image and was dropped"
    return Finding("warning", "box outside image", source, message, "correct the box or the image's size")


def settle_masks(records: list[Record], source: Path, findings: list[Finding]) -> list[Record]:
    """All objects of a split have masks, or none has.

    Where most have one, an object without gets its box as its mask; else masks are dropped. Both are
    reported.
    """
    total = sum(len(record.masks or ()) for record in records)
    lacking = sum(mask is None for record in records for mask in record.masks or ())
    if lacking == 0 and total > 0:
        return records
    if 2 * lacking >= total:
        if lacking < total:
            message = f"only {total - lacking} of {total} objects have a mask; masks are not used"
            findings.append(Finding("warning", "too few masks", source, message, "draw masks or remove them"))
        return [replace(record, masks=None) for record in records]
    message = f"{lacking} of {total} objects have no usable mask; their boxes stand in for them"
    findings.append(Finding("warning", "missing mask", source, message, "draw the masks that are missing"))
    return [replace(record, masks=_filled(record)) for record in records]


def _filled(record: Record) -> tuple[Any, ...]:
    def rectangle(box: Iterable[float]) -> list[list[float]]:
        x1, y1, x2, y2 = map(float, box)
        return [[x1, y1, x2, y1, x2, y2, x1, y2]]

    masks = record.masks or ()
    return tuple(mask or rectangle(box) for mask, box in zip(masks, record.boxes_K4, strict=True))


class FileIndex:
    """Which files there are, by one listing for each folder (a question for each file is slow on a network)."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}

    def names(self, folder: Path) -> frozenset[str]:
        """The files in a folder; none where there is no such folder."""
        if folder not in self._names:
            try:
                with os.scandir(folder) as entries:
                    self._names[folder] = frozenset(entry.name for entry in entries if entry.is_file())
            except OSError:
                self._names[folder] = frozenset()
        return self._names[folder]

    def has(self, path: Path) -> bool:
        return path.name in self.names(path.parent)

    def check(self, path: Path, source: Path, findings: list[Finding]) -> bool:
        """Whether an image is there; if not, an error is added."""
        if self.has(path):
            return True
        message = f"its image {path} does not exist"
        fix = "restore the file, correct data.images, or drop the entry"
        findings.append(Finding("error", "missing image", source, message, fix))
        return False


def report_duplicates(
    ids: Iterable[Any], what: str, source: Path, findings: list[Finding], fix: str = "give each its own id"
) -> None:
    """An error for each id that occurs more than once."""
    for value, times in Counter(ids).items():
        if times > 1:
            message = f"{what} {value} occurs {times} times"
            findings.append(Finding("error", f"duplicate {what}", source, message, fix))


def report_empty(name: str, images: int, objects: int, source: Path, findings: list[Finding]) -> None:
    """An error for a split without images or without a single object."""
    if images == 0:
        message, fix = f"split {name!r} has no images", "check that this is the right file"
        findings.append(Finding("error", "empty split", source, message, fix))
    elif objects == 0:
        message, fix = f"split {name!r} has no objects on its {images} images", "check the annotations"
        findings.append(Finding("error", "empty split", source, message, fix))


def select_classes(split: Split, classes: Sequence[str]) -> Split:
    """Keep these classes, in this order; images without them stay, as background.

    Raises:
        UserError: a class that the split does not have, with the nearest name it has.
    """
    for name in classes:
        if name not in split.classes:
            raise UserError(
                f"{split.source}: data.classes names {name!r}, which is not there; "
                f"{nearest(name, split.classes)}"
            )
    doubled = [name for name, times in Counter(classes).items() if times > 1]
    if doubled:
        raise UserError(f"data.classes names {doubled[0]!r} twice; name each class once")
    ids = dict(zip(split.classes, split.category_ids or range(len(split.classes)), strict=True))
    return relabel(split, classes, lambda name: ids[name])


def relabel(split: Split, classes: Sequence[str], category_id: Callable[[str], int]) -> Split:
    """The split in another list of classes; objects of classes that are not in it are left out."""
    new_label = {name: i for i, name in enumerate(classes)}
    table = np.array([new_label.get(name, -1) for name in split.classes], dtype=np.int64)
    codes: dict[int, LabelCode] = {}  # one for all maps that share one
    return replace(
        split,
        records=[_relabelled(record, table, codes) for record in split.records],
        classes=tuple(classes),
        category_ids=None if split.category_ids is None else tuple(category_id(name) for name in classes),
    )


def _relabelled(record: Record, table: NDArray[np.int64], codes: dict[int, LabelCode]) -> Record:
    labels_K = table[record.labels_K]
    kept_K = labels_K >= 0
    masks, label_map = record.masks, record.label_map
    if label_map is not None:
        code = label_map.code
        if id(code) not in codes:
            after_256 = np.full(256, UNLABELLED, np.uint8)
            after_256[: len(table)] = np.where(table < 0, UNLABELLED, table)
            codes[id(code)] = LabelCode(after_256[code.classes_256], code.declared_256)
        label_map = LabelMap(label_map.path, codes[id(code)])
    return replace(
        record,
        label_map=label_map,
        boxes_K4=record.boxes_K4[kept_K],
        labels_K=labels_K[kept_K],
        ignore_K=record.ignore_K[kept_K],
        areas_K=record.areas_K[kept_K],
        masks=None if masks is None else tuple(m for m, kept in zip(masks, kept_K, strict=True) if kept),
    )
