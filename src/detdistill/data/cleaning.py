"""What every annotation format shares: objects become a record, and what is wrong with them a finding."""

from __future__ import annotations

import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detdistill.data.masks import usable_segmentation
from detdistill.data.packed import Packed
from detdistill.data.records import (
    UNLABELED,
    Finding,
    LabelCode,
    Masks,
    Record,
    Records,
    Split,
    encode_segmentation,
)
from detdistill.errors import UserError, nearest
from detdistill.recipe import names_of

_ROUNDING = 1.0  # pixels by which a box may leave its image before it is worth a word
_ELSEWHERE = 0.1  # IoU of a mask's extent and its object's box, below which one of them is wrong
_LARGE = 20  # pixels; a box within the first two of such an image is in fractions of it
_MANY_IGNORED = 0.5  # the share of ignored objects above which something is wrong with the flags


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
    boxes_K4: NDArray[np.float64] = np.array([raw.box for raw in objects], dtype=np.float64).reshape(-1, 4)
    sizes_K2 = np.tile(np.array(size, dtype=np.float64), (len(objects), 1))
    clipped_K4, kept_K, moved_K = clip_boxes(boxes_K4, sizes_K2)
    findings += [
        box_finding(objects[k].name, boxes_K4[k].tolist(), bool(kept_K[k]), size, source, image_id)
        for k in np.flatnonzero(~kept_K | moved_K).tolist()
    ]
    kept = [raw for raw, keep in zip(objects, kept_K, strict=True) if keep]
    clipped_K4 = clipped_K4[kept_K]
    given_K = np.array([raw.area if is_number(raw.area) else math.nan for raw in kept], dtype=np.float64)
    masks = None
    if with_masks:
        masks = tuple(
            check_mask(raw.mask, size, f"{raw.name} of image {image_id}", source, findings) for raw in kept
        )
    return Record(
        image_id=image_id,
        path=path,
        height=size[0],
        width=size[1],
        boxes_K4=clipped_K4,
        labels_K=np.array([raw.label for raw in kept], dtype=np.int64),
        ignore_K=np.array([raw.ignore for raw in kept], dtype=np.bool_),
        areas_K=fill_areas(given_K, clipped_K4),
        masks=masks,
        source=source,
    )


def clip_boxes(
    boxes_M4: NDArray[np.float64], sizes_M2: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Cut boxes to their images.

    Args:
        boxes_M4: xyxy, pixels.
        sizes_M2: (height, width) of each box's image.

    Returns:
        The boxes cut; which of them are usable, finite and of some size; and which lost a pixel or more.
    """
    limits_M4 = sizes_M2[:, [1, 0, 1, 0]]
    with np.errstate(invalid="ignore", over="ignore"):
        clipped_M4 = np.clip(boxes_M4, 0, limits_M4)
        moved_M = np.abs(boxes_M4 - clipped_M4).max(axis=1, initial=0.0) >= _ROUNDING
        # In float32, so that what counts as empty here is empty for everybody after.
        # The area, too: that of two denormal sides is 0.
        cut_M4 = clipped_M4.astype(np.float32)
        sides_M2 = cut_M4[:, 2:] - cut_M4[:, :2]
        has_size_M = (sides_M2 > 0).all(axis=1) & (sides_M2.prod(axis=1) > 0)
    return cut_M4, has_size_M & np.isfinite(boxes_M4).all(axis=1), moved_M


def fill_areas(given_M: NDArray[np.float64], boxes_M4: NDArray[np.float32]) -> NDArray[np.float32]:
    """The areas that are given, in pixels²; that of the box where one is not finite or not above 0."""
    sides_M2 = boxes_M4[:, 2:] - boxes_M4[:, :2]
    with np.errstate(invalid="ignore", over="ignore"):
        areas_M = given_M.astype(np.float32)
        usable_M = np.isfinite(areas_M) & (areas_M > 0)
        return np.where(usable_M, areas_M, sides_M2[:, 0] * sides_M2[:, 1])


def check_mask(
    segmentation: Any, size: tuple[int, int], name: str, source: Path, findings: list[Finding]
) -> Any | None:
    """What can be decoded of a segmentation; a warning for what is given and cannot.

    Args:
        size: (height, width) of the image.
        name: how a message calls the object.
    """
    if segmentation is None or segmentation in ([], {}, "", [[]]):  # as exporters of boxes write
        return None
    usable = usable_segmentation(segmentation, *size)
    dropped = len(segmentation) - len(usable) if isinstance(usable, list) else 0
    if usable is None:
        message = f"{name} has a segmentation that cannot be decoded: {str(segmentation)[:60]}"
        fix = "write polygons [[x1, y1, x2, y2, …]], or run lengths of the image's size"
        findings.append(Finding("warning", "unusable mask", source, message, fix))
    elif dropped:
        message = f"{name} has {dropped} polygons of fewer than three corners, and they were dropped"
        findings.append(Finding("warning", "polygon dropped", source, message, "draw them again"))
    return usable


def misplaced(extents_M4: NDArray[np.float32], boxes_M4: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which masks are not of their objects: those whose extent has nearly nothing in common with the box.

    Args:
        extents_M4: xyxy, of masks, cut to the image; NaN of an object without.
        boxes_M4: xyxy, of the objects.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        low_M2 = np.maximum(extents_M4[:, :2], boxes_M4[:, :2])
        both_M = np.clip(np.minimum(extents_M4[:, 2:], boxes_M4[:, 2:]) - low_M2, 0, None).prod(axis=1)
        areas_M = [(one[:, 2:] - one[:, :2]).prod(axis=1) for one in (extents_M4, boxes_M4)]
        return np.asarray(both_M < _ELSEWHERE * (areas_M[0] + areas_M[1] - both_M))


def mask_finding(name: str, extent: Sequence[float], box: Sequence[float], source: Path) -> Finding:
    """Of a mask that was dropped since it is :func:`misplaced`; both xyxy in pixels."""
    where, own = (", ".join(f"{value:g}" for value in corners) for corners in (extent, box))
    message = f"{name} has its mask at ({where}) and its box at ({own}); the mask was dropped"
    return Finding("warning", "misplaced mask", source, message, "correct the one that is wrong")


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def box_finding(
    name: str,
    box: Sequence[float],
    kept: bool,
    size: tuple[int, int],
    source: Path,
    image_id: int | str,
) -> Finding:
    """What is wrong with a box, xyxy in pixels, that was dropped or clipped."""
    height, width = size
    x1, y1, x2, y2 = box
    at = f"{name} of image {image_id}: box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
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


def settle_masks(records: Sequence[Record], source: Path, findings: list[Finding]) -> Records:
    """All objects of a split have masks, or none has.

    Where most have one, an object without gets its box as its mask; else masks are dropped. Both are
    reported.
    """
    packed = Records.pack(records)
    if packed.masks is None:
        return packed
    missing_M = packed.masks.missing_N
    total, lacking = len(missing_M), int(missing_M.sum())
    if lacking == 0 and total > 0:
        return packed
    unusable = sum(finding.kind in ("unusable mask", "misplaced mask") for finding in findings)
    if 2 * lacking >= total:
        if lacking < total or unusable:
            problem = f" ({unusable} have a segmentation that cannot be decoded or is far from the box)"
            why = problem if unusable else ""
            message = f"only {total - lacking} of {total} objects have a usable mask{why}; masks are not used"
            fix = "correct the segmentations, or remove them" if unusable else "draw masks or remove them"
            findings.append(Finding("warning", "too few masks", source, message, fix))
        return replace(packed, masks=None)
    message = f"{lacking} of {total} objects have no usable mask; their boxes stand in for them"
    findings.append(Finding("warning", "missing mask", source, message, "draw the masks that are missing"))
    strings = list(packed.masks.packed)
    for place in np.flatnonzero(missing_M).tolist():
        x1, y1, x2, y2 = packed.boxes_M4[place].tolist()
        strings[place] = encode_segmentation([[x1, y1, x2, y1, x2, y2, x1, y2]])
    return replace(packed, masks=Masks(Packed.pack(strings)))


def name_key(name: str) -> str:
    """What two spellings of a file name have in common: letter case and Unicode form do not count.

    macOS and some archives decompose characters, others compose them: the same name is two byte strings.
    """
    return unicodedata.normalize("NFC", name).casefold()


class FileIndex:
    """Which files there are, by one listing for each folder (a question for each file is slow on a network)."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}
        self._by_key: dict[str, dict[str, list[str]]] = {}

    def names(self, folder: Path | str) -> frozenset[str]:
        """The files in a folder; none where there is no such folder."""
        folder = str(folder)
        if folder not in self._names:
            try:
                with os.scandir(folder) as entries:
                    self._names[folder] = frozenset(entry.name for entry in entries if entry.is_file())
            except (OSError, ValueError):  # a name that no file can have, as one with a zero byte
                self._names[folder] = frozenset()
        return self._names[folder]

    def has(self, path: Path | str) -> bool:
        """Whether there is such a file."""
        folder, name = os.path.split(path)
        return name in self.names(folder or ".")

    def find(self, path: str) -> str | None:
        """The file of this name, else the only one that differs in letter case or Unicode form alone."""
        if self.has(path):
            return path
        folder, name = os.path.split(path)
        if not folder.isascii() and not self.names(folder):
            forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
            others = (unicodedata.normalize(form, folder) for form in forms)
            folder = next((other for other in others if self.names(other)), folder)
        if folder not in self._by_key:
            by_key = defaultdict(list)
            for other in self.names(folder or "."):
                by_key[name_key(other)].append(other)
            self._by_key[folder] = by_key
        spellings = self._by_key[folder].get(name_key(name), [])
        return os.path.join(folder, spellings[0]) if len(spellings) == 1 else None  # noqa: PTH118 - 118,000 times

    def check(
        self,
        path: Path,
        source: Path,
        findings: list[Finding],
        fix: str = "restore the file, correct data.images, or drop the entry",
    ) -> bool:
        """Whether an image is there; if not, an error is added."""
        if self.has(path):
            return True
        message = f"its image {path} does not exist"
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


def report_ignored(split: Split, findings: list[Finding]) -> None:
    """A warning where most objects are ignored: then a flag says what it does not mean."""
    ignored_M = split.records.ignore_M
    ignored, total = int(ignored_M.sum()), len(ignored_M)
    if ignored > _MANY_IGNORED * total:
        message = f"{ignored} of {total} objects of {split.name} are ignored (COCO's iscrowd, VOC's difficult)"
        fix = "they are neither learned nor measured: clear the flag of those that should be"
        findings.append(Finding("warning", "ignored objects", split.source, message, fix))


def report_fractions(split: Split, findings: list[Finding]) -> None:
    """An error where boxes are in fractions of the image, a warning where a few are: pixels are meant.

    In pixels such a box is in the corner of its image, of one pixel or two.
    """
    records = split.records
    large_M = (np.minimum(records.heights_N, records.widths_N) >= _LARGE)[records.images_M]
    fractions_M = large_M & (records.boxes_M4.max(axis=1, initial=0) <= 2)  # 2: corners read as (x, y, w, h)
    count, total = int(fractions_M.sum()), len(fractions_M)
    if not count:
        return
    first = int(np.flatnonzero(fractions_M)[0])
    box = ", ".join(f"{value:g}" for value in records.boxes_M4[first])
    example = f"({box}) of image {records.image_id(int(records.images_M[first]))}"
    message = f"{count} of {total} boxes look normalized (0 to 1), as {example}; they must be in pixels"
    fix = "multiply them by the width and height of the image"
    severity: Literal["error", "warning"] = "error" if 2 * count > total else "warning"
    findings.append(Finding(severity, "normalized box", split.source, message, fix))


def select_classes(split: Split, classes: Sequence[str]) -> Split:
    """Keep these classes, in this order; images without them stay, as background.

    Raises:
        UserError: a class that the split does not have, with the nearest name it has.
    """
    classes = names_of(classes, "classes")
    category_ids = dict(zip(split.classes, split.category_ids or range(len(split.classes)), strict=True))
    for name in classes:
        if name not in category_ids:
            raise UserError(
                f"{split.source}: data.classes names {name!r}, which is not there; "
                f"{nearest(name, split.classes)}"
            )
    doubled = [name for name, times in Counter(classes).items() if times > 1]
    if doubled:
        raise UserError(f"data.classes names {doubled[0]!r} twice; name each class once")
    return relabel(split, classes, lambda name: category_ids[name])


def relabel(split: Split, classes: Sequence[str], category_id: Callable[[str], int | str]) -> Split:
    """The split in another list of classes; objects of classes that are not in it are left out."""
    new_label = {name: i for i, name in enumerate(classes)}
    table = np.array([new_label.get(name, -1) for name in split.classes], dtype=np.int64)
    records = split.records
    labels_M = table[records.labels_M]
    codes = tuple(_relabeled(code, table) for code in records.codes)
    return replace(
        split,
        records=replace(records, labels_M=labels_M, codes=codes).keep(labels_M >= 0),
        classes=tuple(classes),
        category_ids=None if split.category_ids is None else tuple(category_id(name) for name in classes),
    )


def _relabeled(code: LabelCode, table: NDArray[np.int64]) -> LabelCode:
    after_256 = np.full(256, UNLABELED, np.uint8)
    after_256[: len(table)] = np.where(table < 0, UNLABELED, table)
    return LabelCode(after_256[code.classes_256], code.declared_256)
