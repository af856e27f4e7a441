"""COCO average precision: an adapter over hotcoco, with pycocotools as its fallback and as the parity oracle.

Both libraries fill the same arrays, so the 12 numbers are read here from the precision and recall of either,
in the way of ``COCOeval.summarize`` (cocodataset.org/#detection-eval).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from detdistill.config import UserError
from detdistill.data.records import Split
from detdistill.evaluation.detections import finite_detections

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


@dataclass(frozen=True)
class CocoResult:
    """The 12 COCO numbers and AP by class, all in [0, 1].

    A number is NaN where the ground truth has no object to measure it on (pycocotools says -1): ``APL`` of a
    dataset without large objects, or the AP of a class that does not occur. NaN is printed as "–".
    """

    AP: float
    AP50: float
    AP75: float
    APS: float
    APM: float
    APL: float
    AR1: float
    AR10: float
    AR100: float
    ARS: float
    ARM: float
    ARL: float
    per_class: dict[str, float]
    per_class_AP50: dict[str, float]

    def as_dict(self) -> dict[str, float]:
        """The 12 numbers by name, in the usual order."""
        return {name: getattr(self, name) for name in COCO_NUMBERS}

    def __str__(self) -> str:
        shown = ((name, "–" if math.isnan(value) else f"{value:.3f}") for name, value in self.as_dict().items())
        return "  ".join(f"{name} {value}" for name, value in shown)


def coco_ap(
    split: Split,
    detections: Sequence[Mapping[str, Any]],
    iou_type: IouType = "bbox",
    backend: Backend | None = None,
) -> CocoResult:
    """Average precision of detections on a split.

    Args:
        split: the ground truth; ``ignore_K`` objects (COCO crowd, VOC difficult) count as crowd.
        detections: one for each of ``split.records``, in that order: ``boxes`` (K, 4) xyxy in pixels of the
            original image, ``labels`` (K,) indices into ``split.classes``, ``scores`` (K,); for ``segm`` also
            ``masks`` (K, H, W) or (K, 1, H, W), object where above 0.5. Tensors or arrays.
        iou_type: overlap of boxes or of masks.
        backend: hotcoco where it is installed, else pycocotools, unless said.

    Detections with a box or score that is not finite are dropped, with a warning that counts them.

    Raises:
        UserError: an empty split, ``segm`` on a split without masks, or no evaluator installed.
        ValueError: not one detections for each record, or labels outside the classes.
    """
    if not split.records:
        raise UserError(f"{split.source}: split {split.name!r} has no images to evaluate on; check its file")
    if iou_type == "segm" and any(record.masks is None for record in split.records):
        raise UserError(f"{split.source}: has no masks; evaluate its boxes (bbox)")
    usable = finite_detections(split, detections)
    library = _library(backend)
    results = _mask_results(usable, library) if iou_type == "segm" else _box_rows(usable)
    return _evaluate(library, _ground_truth(split), results, iou_type)


def coco_ap_from_files(
    ground_truth: Path | str, results: Path | str, iou_type: IouType = "bbox", backend: Backend | None = None
) -> CocoResult:
    """Average precision of a COCO results file against a COCO annotation file.

    Raises:
        UserError: a file cannot be read, or holds results for images that the annotations do not have.
    """
    truth, found = _read(ground_truth), _read(results)
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= truth.keys():
        raise UserError(f"{ground_truth}: not COCO annotations; it needs images, annotations and categories")
    if not isinstance(found, list):
        raise UserError(f"{results}: not COCO results; it should be a list of detections")
    unknown = {row["image_id"] for row in found} - {image["id"] for image in truth["images"]}
    if unknown:
        raise UserError(
            f"{results}: {len(unknown)} image ids (as {min(unknown)}) are not in {ground_truth}; "
            "give the results of this split"
        )
    return _evaluate(_library(backend), truth, found, iou_type)


def _ground_truth(split: Split) -> dict[str, Any]:
    """The split as a COCO file would say it; image ids are positions, so that ids of any type work."""
    annotations: list[dict[str, Any]] = []
    for i, record in enumerate(split.records):
        boxes = record.boxes_K4.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        for k, box in enumerate(boxes.tolist()):
            annotation = {
                "id": len(annotations) + 1,  # from 1: pycocotools takes a match with id 0 for no match
                "image_id": i,
                "category_id": int(record.labels_K[k]) + 1,
                "bbox": box,
                "area": float(record.areas_K[k]),
                "iscrowd": int(record.ignore_K[k]),
            }
            if record.masks is not None:
                annotation["segmentation"] = record.masks[k]
            annotations.append(annotation)
    return {
        "images": [{"id": i, "height": r.height, "width": r.width} for i, r in enumerate(split.records)],
        "categories": [{"id": q + 1, "name": name} for q, name in enumerate(split.classes)],
        "annotations": annotations,
    }


def _box_rows(detections: Sequence[Mapping[str, NDArray[Any]]]) -> NDArray[np.float64]:
    """(D, 7): image id, x, y, width, height, score, category id."""
    rows = [np.zeros((0, 7))]
    for i, found in enumerate(detections):
        corner, size = found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]
        ids = np.full(len(corner), float(i))
        rows.append(np.column_stack([ids, corner, size, found["scores"], found["labels"] + 1.0]))
    return np.concatenate(rows)


def _mask_results(
    detections: Sequence[Mapping[str, NDArray[Any]]], library: ModuleType
) -> list[dict[str, Any]]:
    results = []
    for i, found in enumerate(detections):
        for label, score, mask in zip(found["labels"], found["scores"], found["masks"], strict=True):
            pixels = np.asfortranarray(mask.reshape(mask.shape[-2:]) > 0.5, dtype=np.uint8)
            results.append({
                "image_id": i, "category_id": int(label) + 1, "score": float(score),
                "segmentation": library.mask.encode(pixels),
            })  # fmt: skip
    return results


def _evaluate(library: ModuleType, truth: dict[str, Any], results: Any, iou_type: IouType) -> CocoResult:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = _index(library, truth)
        # pycocotools cannot load an empty list of results.
        found = coco.loadRes(results) if len(results) else _index(library, {**truth, "annotations": []})
        evaluator = library.COCOeval(coco, found, iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
    # (IoU thresholds, recalls, classes, areas, caps) and the same without recalls; -1 where undefined.
    precision, recall = (np.asarray(evaluator.eval[name]) for name in ("precision", "recall"))
    numbers = {}
    for name, (threshold, area, cap) in COCO_NUMBERS.items():
        table = precision if name.startswith("AP") else recall
        numbers[name] = _mean(table[threshold, ..., area, cap])
    names = {category["id"]: category["name"] for category in truth["categories"]}
    classes = [names[category_id] for category_id in evaluator.params.catIds]
    return CocoResult(
        **numbers,
        per_class={name: _mean(precision[:, :, k, 0, 2]) for k, name in enumerate(classes)},
        per_class_AP50={name: _mean(precision[0, :, k, 0, 2]) for k, name in enumerate(classes)},
    )


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def _index(library: ModuleType, dataset: dict[str, Any]) -> Any:
    coco = library.COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _read(path: Path | str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); give a COCO file") from error


def _library(backend: Backend | None) -> ModuleType:
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
