"""How `check` looks at a data set: all annotations are read, a sample of images and label maps decoded."""

from __future__ import annotations

import filecmp
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from detdistill.data.box_checks import doubled_boxes
from detdistill.data.formats.label_maps import PixelCounts, count_pixels, sampled
from detdistill.data.images import READERS, read_image
from detdistill.data.loading import open_data
from detdistill.data.records import UNLABELED, Finding, Record, Split
from detdistill.data.unlabeled import find_unlabeled
from detdistill.errors import UserError
from detdistill.recipe import DataConfig

Item = TypeVar("Item")
Result = TypeVar("Result")

COUNTED_DETECTIONS = 100  # the last of COCO's maxDets
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
_DARK = 64  # what 14 bits reach in a file of 16
# How the last bytes of a whole file look; a download that was cut short lacks them.
_ENDINGS = {".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND"}


@dataclass(frozen=True)
class Statistics:
    """What a split holds.

    Attributes:
        images, background: images, and those of them without an object.
        objects, ignored: objects, and those of them that are crowd or difficult.
        per_class: objects by class name, in the order of the classes.
        sizes: the square root of the boxes' area in pixels at the quantiles 0, 10, 50, 90 and 100%; empty
            without objects.
        pixels: of label maps, the share of each class in the pixels of the sample, and of "unlabeled"; else
            empty.
    """

    images: int
    background: int
    objects: int
    ignored: int
    per_class: dict[str, int]
    sizes: tuple[float, ...]
    pixels: dict[str, float]

    def lines(self, name: str, source: Path) -> list[str]:
        """The numbers as text."""
        where = f"in {len(self.per_class)} classes, from {source}"
        if self.pixels:
            shares = ", ".join(f"{cls} {100 * share:.1f}%" for cls, share in self.pixels.items())
            return [f"{name}: {self.images} images with label maps {where}", f"  pixels of a sample: {shares}"]
        lines = [
            f"{name}: {self.images} images ({self.background} background), {self.objects} objects "
            f"({self.ignored} ignored) {where}"
        ]
        if self.sizes:
            quantiles = ", ".join(f"{size:.0f}" for size in self.sizes)
            lines.append(f"  object sizes (√area, px) at 0, 10, 50, 90, 100%: {quantiles}")
        counts = ", ".join(f"{cls} {n}" for cls, n in self.per_class.items())
        return [*lines, f"  objects by class: {counts}"]


@dataclass(frozen=True)
class Inspection:
    """Splits, what is wrong with them, and what they hold; ``decoded`` images were decoded.

    ``unlabeled`` counts the images without labels.
    """

    splits: dict[str, Split]
    findings: list[Finding]
    statistics: dict[str, Statistics]
    decoded: int
    unlabeled: int = 0

    @property
    def errors(self) -> list[Finding]:
        """The findings with which no training starts."""
        return [finding for finding in self.findings if finding.severity == "error"]

    def lines(self, per_kind: int = 5) -> list[str]:
        """The report as text: numbers first, then the findings, at most ``per_kind`` of each kind."""
        lines = []
        for name, stats in self.statistics.items():
            lines += stats.lines(name, self.splits[name].source)
        if self.unlabeled:
            lines.append(f"unlabeled: {self.unlabeled} images")
        by_kind: dict[tuple[str, str], list[Finding]] = defaultdict(list)
        for finding in self.findings:
            by_kind[finding.severity, finding.kind].append(finding)
        for (severity, kind), found in sorted(by_kind.items()):
            lines += [str(finding) for finding in found[:per_kind]]
            if len(found) > per_kind:
                lines.append(f"{severity}: {kind}: {len(found) - per_kind} more like these")
        errors = len(self.errors)
        warnings = len(self.findings) - errors
        lines.append(f"{self.decoded} images decoded; {errors} errors, {warnings} warnings")
        return lines


def inspect_data(config: DataConfig, sample: int | None = 64) -> Inspection:
    """Read all annotations, look at the end of every image file and decode some images.

    Args:
        sample: images to decode of each split, the same ones every time; None decodes all.

    Raises:
        UserError: as :func:`~detdistill.data.loading.open_data`: there is nothing to inspect.
    """
    splits = open_data(config)
    findings = [finding for split in splits.values() for finding in split.findings]
    pixels = {}
    for name, split in splits.items():
        findings += _file_findings(split, sample)
        counts = count_pixels(split, sample) if split.has_label_maps else None
        pixels[name] = {} if counts is None else _shares(split, counts)
        findings += [] if counts is None else counts.findings
    statistics = {name: _statistics(split, pixels[name]) for name, split in splits.items()}
    for name, split in splits.items():
        findings += _absent_classes(split, statistics[name])
        findings += _repeated_images(split)
        findings += doubled_boxes(split)
    if "train" in splits and "val" in splits:
        findings += _shared_images(splits["train"], splits["val"])
    if "val" in splits:
        findings += _crowded_images(splits["val"])
    for name in {"train", "val"} - splits.keys():
        message, fix = f"there is no {name} part", f"set data.{name}" + ", perhaps to 20%" * (name == "val")
        root = config.root or Path("digits")
        findings.append(Finding("warning", "missing split", root, message, fix))
    decoded = sum(len(sampled(split.records, sample)) for split in splits.values())
    unlabeled = find_unlabeled(config) if config.unlabeled is not None else []
    if unlabeled:
        chosen = sampled(unlabeled, sample)
        decoded += len(chosen)
        findings += _unlabeled_findings(unlabeled, chosen, splits.get("val"))
    return Inspection(splits, findings, statistics, decoded, len(unlabeled))


def _unlabeled_findings(files: Sequence[Path], chosen: Sequence[Path], val: Split | None) -> list[Finding]:
    """Images that cannot be decoded, and those on which the student would be measured."""
    findings = [finding for finding in _in_threads(_undecodable, chosen) if finding is not None]
    measured = {record.path.resolve() for record in val.records} if val is not None else set()
    seen = [file for file in files if file.resolve() in measured]
    if val is not None and seen:
        message = f"{len(seen)} images of data.unlabeled are in val, as {seen[0]}"
        fix = "leave them out, or the student is measured on what it has seen"
        findings.append(Finding("warning", "shared images", val.source, message, fix))
    return findings


def _undecodable(path: Path) -> Finding | None:
    image = _decoded(path)
    return image if isinstance(image, Finding) else None


def _decoded(path: Path, size: tuple[int, int] | None = None) -> Tensor | Finding:
    """The pixels, or why there are none."""
    try:
        return read_image(path, size)
    except UserError as error:
        problem = str(error).removeprefix(f"{path}: ").split(";")[0]
        return Finding("error", "undecodable image", path, problem, "restore the image or drop it")


def _file_findings(split: Split, sample: int | None) -> list[Finding]:
    """Decode the sample, and look at the last bytes of all other images."""
    chosen = sampled(split.records, sample)
    decoded = {str(record.path) for record in chosen}
    others = [(i, path) for i, path in enumerate(split.records.paths.texts()) if path not in decoded]
    cut = [i for i, whole in _in_threads(_looks_whole, others) if not whole]
    suspect = [*chosen, *(split.records[i] for i in cut)]
    results = _in_threads(partial(_decode_finding, source=split.source), suspect)
    return [finding for finding in results if finding is not None]


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results in order; some items at a time, since a thread's task costs more than a look at a file."""
    size = max(1, min(500, len(items) // (4 * READERS)))
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    with ThreadPoolExecutor(READERS) as pool:
        return [
            result
            for part in pool.map(lambda part: [function(item) for item in part], parts)
            for result in part
        ]


def _decode_finding(record: Record, source: Path) -> Finding | None:
    image = _decoded(record.path, (record.height, record.width))
    if isinstance(image, Finding):
        return image
    if tuple(image.shape[1:]) == (record.height, record.width):
        return _dark_finding(record.path, int(image.max()))
    source = record.source or source
    message = f"is {image.shape[2]}×{image.shape[1]}, but {source} says {record.width}×{record.height}"
    return Finding("error", "wrong size", record.path, message, "correct the size there or restore the image")


def _dark_finding(path: Path, brightest: int) -> Finding | None:
    """12 bits in a file of 16 are read as if the upper 4 had been left empty on purpose."""
    if brightest >= _DARK:
        return None
    message, fix = (
        f"its brightest value is {brightest} of 255",
        "of 16 bits the upper 8 are read: use their range",
    )
    return Finding("warning", "dark image", path, message, fix)


def _looks_whole(item: tuple[int, str]) -> tuple[int, bool]:
    """Whether the file's last bytes are those of a whole image; cameras may write more after the end."""
    place, path = item
    ending = _ENDINGS.get(os.path.splitext(path)[1].lower())  # noqa: PTH122 - a hundred thousand times
    if ending is None:
        return place, True
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
            return place, ending in file.read()
    except OSError:
        return place, False


def _shares(split: Split, counts: PixelCounts) -> dict[str, float]:
    """The share of each class in the sample's pixels, and of those without."""
    shares = (counts.counts_256 / max(1, counts.counts_256.sum())).tolist()
    return {**dict(zip(split.classes, shares, strict=False)), "unlabeled": shares[UNLABELED]}


def _statistics(split: Split, pixels: dict[str, float]) -> Statistics:
    records = split.records
    counts = np.bincount(records.labels_M, minlength=len(split.classes)).tolist()
    sizes = np.sqrt((records.boxes_M4[:, 2:] - records.boxes_M4[:, :2]).prod(axis=1))
    return Statistics(
        images=len(records),
        background=int((records.counts_N == 0).sum()),
        objects=len(records.labels_M),
        ignored=int(records.ignore_M.sum()),
        per_class=dict(zip(split.classes, counts, strict=True)),
        sizes=tuple(np.quantile(sizes, _QUANTILES).tolist()) if sizes.size else (),
        pixels=pixels,
    )


def _absent_classes(split: Split, statistics: Statistics) -> list[Finding]:
    """Classes of which nothing can be learnt or, of pixels, measured."""
    if statistics.pixels:
        empty = [name for name, share in statistics.pixels.items() if share == 0 and name != "unlabeled"]
        message = f"{len(empty)} classes have no pixel in {split.name}'s sample: {', '.join(empty)}"
    else:
        empty = [name for name, count in statistics.per_class.items() if count == 0]
        message = f"{len(empty)} classes have no objects in {split.name}: {', '.join(empty)}"
        if statistics.objects == 0 or split.name != "train":
            return []
    if not empty:
        return []
    return [Finding("warning", "empty class", split.source, message, "label some, or set data.classes")]


def _repeated_images(split: Split) -> list[Finding]:
    """One file under two ids: each of them is background where the other's objects are."""
    times = Counter(split.records.paths)
    repeated = [path for path, count in times.items() if count > 1]
    if not repeated:
        return []
    example = repeated[0].decode("utf-8", "replace")
    message = f"{len(repeated)} images are listed more than once, as {example}"
    return [Finding("warning", "repeated image", split.source, message, "put all objects of one under one id")]


def _crowded_images(val: Split) -> list[Finding]:
    """COCO's AP counts so many detections of an image and no more: further objects count as missed."""
    counts_N = np.bincount(val.records.images_M[~val.records.ignore_M], minlength=1)
    crowded = counts_N[counts_N > COUNTED_DETECTIONS].tolist()
    if not crowded:
        return []
    message = (
        f"{len(crowded)} images have more than {COUNTED_DETECTIONS} objects, up to {max(crowded)}, and COCO's "
        f"AP counts {COUNTED_DETECTIONS} detections of an image: it cannot reach 100 here"
    )
    return [
        Finding("warning", "many objects", val.source, message, "cut such images into tiles, or read AP so")
    ]


def _shared_images(train: Split, val: Split) -> list[Finding]:
    """The same image in both parts, also under another name, makes the numbers of val worthless."""
    paths = [list(dict.fromkeys(split.records.paths.texts())) for split in (train, val)]
    sizes = [dict(zip(part, _in_threads(_bytes_of, part), strict=True)) for part in paths]
    both = set(sizes[0].values()) & set(sizes[1].values()) - {0}
    suspects = [[path for path, size in part.items() if size in both] for part in sizes]
    marks = [_in_threads(_mark, part) for part in suspects]
    of_train = dict(zip(marks[0], suspects[0], strict=True))
    shared = [
        (path, of_train[mark])
        for path, mark in zip(suspects[1], marks[1], strict=True)
        if mark in of_train and filecmp.cmp(path, of_train[mark], shallow=False)
    ]
    if not shared:
        return []
    example = " and ".join(map(str, dict.fromkeys(shared[0])))
    message = f"{len(shared)} images are in both train and val, as {example}"
    return [Finding("warning", "shared images", val.source, message, "move them out of one of the two")]


def _bytes_of(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a hundred thousand times
    except OSError:
        return 0


def _mark(path: str) -> tuple[int, bytes]:
    """The file's size and its middle: what differs between two images, without reading them whole."""
    size = _bytes_of(path)
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            file.seek(size // 2)
            return size, file.read(1024)
    except OSError:
        return size, b""
