"""Which objects one detector finds and another does not, and which false alarms it adds or is rid of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detdistill.data.records import Split
from detdistill.errors import UserError
from detdistill.evaluation.coco import coco_rows, coco_truth
from detdistill.evaluation.coco_library import Backend, evaluated, load_library
from detdistill.evaluation.detections import finite_detections

Kind = Literal["found", "lost", "new false alarm", "gone false alarm"]
CHANGES: tuple[Kind, ...] = ("found", "lost", "new false alarm", "gone false alarm")


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that the second detector does otherwise.

    Attributes:
        kind: ``found`` and ``lost`` are objects; the false alarms are detections.
        box: (4,) xyxy in pixels: the object's, or the false alarm's.
        label: index into the split's classes.
        score: of a false alarm; NaN for objects.
        area: pixels²; an object's as annotated.
    """

    kind: Kind
    box: tuple[float, float, float, float]
    label: int
    score: float
    area: float


@dataclass(frozen=True, slots=True)
class ImageDifference:
    """What differs on the image at ``index`` of the split's records; small things first."""

    index: int
    changes: tuple[Change, ...]

    def count(self, kind: Kind) -> int:
        return sum(change.kind == kind for change in self.changes)


def difference(
    split: Split,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    *,
    threshold: float = 0.3,
    overlap: float = 0.5,
    backend: Backend | None = None,
) -> list[ImageDifference]:
    """Compare what two detectors find on the same images.

    An object is found by a detection of its class, of a score of at least ``threshold`` and an IoU of at least
    ``overlap``, matched in COCO's way (best score first, one each). What is left over, crowd and difficult
    objects aside, is a false alarm; two false alarms of a class that overlap so much are the same one.

    Returns:
        The images that differ: first those with objects found or lost, by the smallest of these, then those of
        which only the false alarms differ, by the best score.

    Raises:
        UserError: an empty split, or no evaluator installed.
        ValueError: not one detections for each record, or labels outside the classes.
    """
    if not split.records:
        raise UserError(f"{split.source}: split {split.name!r} has no images to compare on; check its file")
    library, truth = load_library(backend), coco_truth(split)
    sides = [_confident_rows(split, found, threshold) for found in (before, after)]
    (hit_before, false_before), (hit_after, false_after) = (
        _match(library, truth, rows, overlap) for rows in sides
    )
    changes: list[list[Change]] = [[] for _ in split.records]
    kinds: tuple[tuple[Kind, set[int]], ...] = (
        ("found", hit_after - hit_before),
        ("lost", hit_before - hit_after),
    )
    for kind, ids in kinds:
        for i in ids:
            one = truth["annotations"][i - 1]  # ids are positions, from 1
            box, label = _xyxy(one["bbox"]), one["category_id"] - 1
            changes[one["image_id"]].append(Change(kind, box, label, math.nan, one["area"]))
    alarms_before, alarms_after = sides[0][false_before], sides[1][false_after]
    pairs: tuple[tuple[Kind, NDArray[np.float64], NDArray[np.float64]], ...] = (
        ("new false alarm", alarms_after, alarms_before),
        ("gone false alarm", alarms_before, alarms_after),
    )
    for kind, rows, others in pairs:
        _, unmatched = _match(library, {**truth, "annotations": _as_objects(others)}, rows, overlap)
        for image, x, y, width, height, score, category in rows[unmatched].tolist():
            alarm = Change(kind, _xyxy((x, y, width, height)), int(category) - 1, score, width * height)
            changes[int(image)].append(alarm)
    differing = [
        ImageDifference(i, tuple(sorted(own, key=lambda c: (CHANGES.index(c.kind), c.area, c.box))))
        for i, own in enumerate(changes)
        if own
    ]
    return sorted(differing, key=_rank)


def counts(differences: Sequence[ImageDifference]) -> dict[str, int]:
    """How many changes of each kind there are in all."""
    found = Counter(change.kind for image in differences for change in image.changes)
    return {kind: found[kind] for kind in CHANGES}


def _rank(image: ImageDifference) -> tuple[float, float, int]:
    objects = [change.area for change in image.changes if change.kind in ("found", "lost")]
    best = max((change.score for change in image.changes if not math.isnan(change.score)), default=0.0)
    return min(objects, default=math.inf), -best, image.index


def _confident_rows(
    split: Split, detections: Sequence[Mapping[str, Any]], threshold: float
) -> NDArray[np.float64]:
    rows_D7 = coco_rows(finite_detections(split, detections))
    return rows_D7[rows_D7[:, 5] >= threshold]


def _match(
    library: ModuleType, truth: Mapping[str, Any], rows_D7: NDArray[np.float64], overlap: float
) -> tuple[set[int], list[int]]:
    """The ids of the objects that were found, and the rows that are neither a hit nor on an ignored object."""
    evaluator = evaluated(library, dict(truth), rows_D7, thresholds=(overlap,))
    hits: set[int] = set()
    matched: set[int] = set()
    for one in evaluator.evalImgs:
        if one is None or list(one["aRng"]) != list(evaluator.params.areaRng[0]):
            continue
        objects = zip(one["gtIds"], np.ravel(one["gtMatches"]), one["gtIgnore"], strict=True)
        hits |= {int(i) for i, by, ignored in objects if by > 0 and not ignored}
        rows = zip(one["dtIds"], np.ravel(one["dtMatches"]), strict=True)
        matched |= {int(i) - 1 for i, to in rows if to > 0}
    return hits, [i for i in range(len(rows_D7)) if i not in matched]


def _as_objects(rows_D7: NDArray[np.float64]) -> list[dict[str, Any]]:
    return [
        {
            "id": i, "image_id": int(row[0]), "category_id": int(row[6]), "bbox": row[1:5],
            "area": row[3] * row[4], "iscrowd": 0,
        }
        for i, row in enumerate(rows_D7.tolist(), start=1)
    ]  # fmt: skip


def _xyxy(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height
