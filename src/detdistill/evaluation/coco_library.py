"""The adapter to the two libraries that compute COCO average precision: hotcoco, else pycocotools.

Both fill the same arrays, so the 12 numbers are read here from the precision and recall of either, in the way
of ``COCOeval.summarize`` (cocodataset.org/#detection-eval). hotcoco takes seconds where pycocotools takes
a minute (benchmarks/evaluator.py).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detdistill.errors import UserError

Backend = Literal["hotcoco", "pycocotools"]
IouType = Literal["bbox", "segm"]

# Where each number stands in the arrays: (IoU threshold or all, area range, detections an image).
_ALL_T, _AREAS, _CAPS = slice(None), {"all": 0, "S": 1, "M": 2, "L": 3}, {1: 0, 10: 1, 100: 2}
COCO_NUMBERS: dict[str, tuple[Any, int, int]] = {
    "AP": (_ALL_T, _AREAS["all"], _CAPS[100]),
    "AP50": (0, _AREAS["all"], _CAPS[100]),
    "AP75": (5, _AREAS["all"], _CAPS[100]),
    **{f"AP{size}": (_ALL_T, _AREAS[size], _CAPS[100]) for size in "SML"},
    **{f"AR{cap}": (_ALL_T, _AREAS["all"], _CAPS[cap]) for cap in (1, 10, 100)},
    **{f"AR{size}": (_ALL_T, _AREAS[size], _CAPS[100]) for size in "SML"},
}


class Numbers(NamedTuple):
    """The 12 numbers by name, and AP by class; NaN where undefined."""

    overall: dict[str, float]
    per_class: dict[str, float]
    per_class_AP50: dict[str, float]


def run_evaluator(library: ModuleType, truth: dict[str, Any], results: Any, iou_type: IouType) -> Numbers:
    """Match results with the truth.

    Args:
        library: from :func:`load_library`.
        truth: COCO annotations.
        results: COCO results, or box rows (D, 7): image id, x, y, width, height, score, category id.
        iou_type: overlap of boxes or of masks.
    """
    evaluator = evaluated(library, truth, results, iou_type)
    # (IoU thresholds, recalls, classes, areas, caps) and the same without recalls; -1 where undefined.
    precision, recall = (np.asarray(evaluator.eval[name]) for name in ("precision", "recall"))
    numbers = {}
    for name, (threshold, area, cap) in COCO_NUMBERS.items():
        table = precision if name.startswith("AP") else recall
        numbers[name] = _mean(table[threshold, ..., area, cap])
    names = {category["id"]: category["name"] for category in truth["categories"]}
    classes = [names[category_id] for category_id in evaluator.params.catIds]
    return Numbers(
        numbers,
        per_class={name: _mean(precision[:, :, k, 0, 2]) for k, name in enumerate(classes)},
        per_class_AP50={name: _mean(precision[0, :, k, 0, 2]) for k, name in enumerate(classes)},
    )


def evaluated(
    library: ModuleType,
    truth: dict[str, Any],
    results: Any,
    iou_type: IouType = "bbox",
    thresholds: Sequence[float] | None = None,
) -> Any:
    """The library's evaluator, matched and accumulated.

    Args:
        library, truth, results, iou_type: as in :func:`run_evaluator`.
        thresholds: of IoU, then with 100 detections an image as the only cap; by default COCO's ten and three.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = _index(library, truth)
        # pycocotools cannot load an empty list of results.
        found = coco.loadRes(results) if len(results) else _index(library, {**truth, "annotations": []})
        evaluator = library.COCOeval(coco, found, iou_type)
        if thresholds is not None:
            evaluator.params.iouThrs = np.asarray(thresholds, dtype=np.float64)
            evaluator.params.maxDets = [100]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def _index(library: ModuleType, dataset: dict[str, Any]) -> Any:
    coco = library.COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def load_library(backend: Backend | None) -> ModuleType:
    """hotcoco's module, or pycocotools' parts under the same names (COCO, COCOeval, mask)."""
    for name in [backend] if backend else ["hotcoco", "pycocotools"]:
        try:
            if name == "hotcoco":
                return importlib.import_module("hotcoco")
            parts = {
                part: importlib.import_module(f"pycocotools.{part}") for part in ("coco", "cocoeval", "mask")
            }
        except ImportError:
            continue
        library = ModuleType("pycocotools")
        vars(library).update(COCO=parts["coco"].COCO, COCOeval=parts["cocoeval"].COCOeval, mask=parts["mask"])
        return library
    raise UserError(f"COCO AP needs {backend or 'hotcoco'}: pip install {backend or 'hotcoco'}")
