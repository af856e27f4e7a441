"""Pascal VOC average precision with the devkit's matching (Everingham et al., IJCV 2010, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detdistill.data.records import Record, Split
from detdistill.errors import UserError
from detdistill.evaluation.detections import finite_detections


@dataclass(frozen=True)
class VocResult:
    """Mean AP and AP by class, in [0, 1]; NaN for a class without objects, which the mean leaves out."""

    mAP: float
    per_class: dict[str, float]


def voc_ap(
    split: Split,
    detections: Sequence[Mapping[str, Any]],
    iou: float = 0.5,
    metric: Literal["area", "11point"] = "area",
    pixel_offset: bool = False,
) -> VocResult:
    """Average precision at one IoU threshold.

    By falling score each detection takes the object of its class and image that it overlaps most; if the IoU
    is at least ``iou`` it is a hit, or a false alarm where an earlier detection took that object. An object of
    ``ignore_K`` (difficult) is not counted, and a detection that takes it neither.

    Args:
        detections: one for each of ``split.records``: ``boxes`` (K, 4) xyxy in pixels of the original image,
            ``labels`` (K,), ``scores`` (K,); tensors or arrays. Not finite ones are dropped, with a warning.
        metric: ``area`` under the precision envelope (VOC 2010 on) or the mean at 11 recalls (VOC 2007).
        pixel_offset: corners are pixel indices, so that a side is x2 - x1 + 1 long, as in the devkit.

    Raises:
        UserError: an empty split.
        ValueError: not one detections for each record, or labels outside the classes.
    """
    if not split.records:
        raise UserError(f"{split.source}: split {split.name!r} has no images to evaluate on; check its file")
    usable = finite_detections(split, detections)
    per_class = {
        name: _class_ap(split.records, usable, label, iou, metric, float(pixel_offset))
        for label, name in enumerate(split.classes)
    }
    defined = [ap for ap in per_class.values() if not math.isnan(ap)]
    return VocResult(float(np.mean(defined)) if defined else math.nan, per_class)


def _class_ap(
    records: Sequence[Record],
    detections: Sequence[Mapping[str, NDArray[Any]]],
    label: int,
    iou: float,
    metric: str,
    offset: float,
) -> float:
    objects, scores, hits, counted = 0, [], [], []
    for record, found in zip(records, detections, strict=True):
        truth = record.labels_K == label
        objects += int((~record.ignore_K[truth]).sum())
        mine = found["labels"] == label
        boxes_D4, scores_D = found["boxes"][mine], found["scores"][mine]
        # Matching does not reach across images, so that each image can be matched on its own.
        order = np.argsort(-scores_D, kind="stable")
        hit, ignored = _match(boxes_D4[order], record.boxes_K4[truth], record.ignore_K[truth], iou, offset)
        scores.append(scores_D[order])
        hits.append(hit)
        counted.append(~ignored)
    if objects == 0:
        return math.nan
    keep = np.concatenate(counted)
    hits_D, scores_D = np.concatenate(hits)[keep], np.concatenate(scores)[keep]
    hits_D = hits_D[np.argsort(-scores_D, kind="stable")]
    found_D = np.cumsum(hits_D)
    recall = found_D / objects
    precision = found_D / np.arange(1, len(hits_D) + 1)
    return _eleven_points(recall, precision) if metric == "11point" else _area(recall, precision)


def _match(
    boxes_D4: NDArray[np.float64],
    truth_K4: NDArray[np.float32],
    ignore_K: NDArray[np.bool_],
    iou: float,
    offset: float,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(hit, ignored) of each detection of one image and class, given by falling score."""
    hit = np.zeros(len(boxes_D4), dtype=bool)
    ignored = np.zeros(len(boxes_D4), dtype=bool)
    if not len(truth_K4) or not len(boxes_D4):
        return hit, ignored
    overlap_DK = _iou(boxes_D4, truth_K4.astype(np.float64), offset)
    taken = np.zeros(len(truth_K4), dtype=bool)
    for d, k in enumerate(overlap_DK.argmax(axis=1)):
        if overlap_DK[d, k] < iou:
            continue
        ignored[d] = ignore_K[k]
        hit[d] = not ignore_K[k] and not taken[k]
        taken[k] = True
    return hit, ignored


def _iou(one_D4: NDArray[np.float64], other_K4: NDArray[np.float64], offset: float) -> NDArray[np.float64]:
    corner = np.maximum(one_D4[:, None, :2], other_K4[None, :, :2])
    sides = (np.minimum(one_D4[:, None, 2:], other_K4[None, :, 2:]) - corner + offset).clip(min=0)
    shared_DK = sides.prod(axis=2)
    area_D, area_K = ((boxes[:, 2:] - boxes[:, :2] + offset).prod(axis=1) for boxes in (one_D4, other_K4))
    union_DK = area_D[:, None] + area_K[None, :] - shared_DK
    return shared_DK / np.maximum(union_DK, np.finfo(np.float64).tiny)


def _area(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _eleven_points(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    # No slack: a recall of 9/15 does not reach the point 6 · 0.1 (0.6000000000000001). Published evaluators
    # compare so, and numbers should be comparable with theirs.
    best = [precision[recall >= point].max(initial=0.0) for point in np.linspace(0, 1, 11)]
    return float(np.mean(best))
