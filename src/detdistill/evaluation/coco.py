"""COCO average precision of detections on a split, or of a results file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_convert

from detdistill.data.masks import encode_masks
from detdistill.data.records import Split
from detdistill.data.text import read_file
from detdistill.errors import UserError
from detdistill.evaluation.coco_library import (
    COCO_NUMBERS,
    Backend,
    IouType,
    Numbers,
    load_library,
    run_evaluator,
)
from detdistill.evaluation.detections import finite_detections


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
            original image, ``labels`` (K,) indices into ``split.classes``, ``scores`` (K,); tensors or arrays.
            For ``segm`` also ``masks``: K run lengths as :func:`~detdistill.data.masks.encode_masks` makes
            them, or (K, H, W) or (K, 1, H, W), object where above 0.5.
        iou_type: overlap of boxes or of masks.
        backend: hotcoco where it is installed, else pycocotools, unless said.

    Detections with a box or score that is not finite are dropped, with a warning that counts them.

    Raises:
        UserError: an empty split, ``segm`` on a split without masks, or no evaluator installed.
        ValueError: not one detections for each record, or labels outside the classes.
    """
    if not split.records:
        raise UserError(f"{split.source}: split {split.name!r} has no images to evaluate on; check its file")
    if iou_type == "segm" and not split.has_masks:
        raise UserError(f"{split.source}: has no masks; evaluate its boxes (bbox)")
    usable = finite_detections(split, detections)
    library = load_library(backend)
    results = _mask_results(usable) if iou_type == "segm" else coco_rows(usable)
    return _result(run_evaluator(library, coco_truth(split), results, iou_type))


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
    return _result(run_evaluator(load_library(backend), truth, found, iou_type))


def coco_truth(split: Split) -> dict[str, Any]:
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


def coco_results(
    split: Split,
    detections: Sequence[Mapping[str, Tensor]],
    masks: Sequence[Sequence[dict[str, Any]]] | None = None,
) -> list[dict[str, Any]]:
    """The rows of a COCO results file, with the image and category ids of the split's own source.

    Args:
        split: what they were made of.
        detections: one for each record, as an evaluation has them.
        masks: their run lengths, likewise; they become each row's ``segmentation``.
    """
    rows = []
    for i, (record, found) in enumerate(zip(split.records, detections, strict=True)):
        own_masks = None if masks is None else masks[i]
        rows += result_rows(record.image_id, found, split.classes, split.category_ids, own_masks)
    return rows


def result_rows(
    image_id: int | str,
    found: Mapping[str, Tensor],
    classes: Sequence[str],
    category_ids: Sequence[int | str] | None,
    masks: Sequence[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The rows of a COCO results file for one image: ``bbox`` is (x, y, width, height) in pixels.

    Each row has the name of its class, too, and where the data have no category ids it says what stands for
    them. Detections with a box or score that is not finite are left out.

    Args:
        image_id: of the image.
        found: ``boxes`` (K, 4) xyxy, ``labels`` (K,), ``scores`` (K,).
        classes: names by label.
        category_ids: the data's own by label; None: they have none.
        masks: K run lengths; they become ``segmentation``.
    """
    ids = ids_in_results(classes, category_ids)
    said = {"category_id_is": "label + 1"} if category_ids is None else {}
    boxes_K4 = box_convert(found["boxes"].double(), "xyxy", "xywh").tolist()
    values = zip(boxes_K4, found["labels"].tolist(), found["scores"].tolist(), strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": ids[label],
            **said,
            "category": classes[label],
            "bbox": box,
            "score": score,
            **({} if masks is None else {"segmentation": masks[k]}),
        }
        for k, (box, label, score) in enumerate(values)
        if all(map(math.isfinite, [*box, score]))
    ]


def ids_in_results(classes: Sequence[str], category_ids: Sequence[int | str] | None) -> Sequence[int | str]:
    """The category ids of results by label: the data's own, or label + 1 where the data have none."""
    return range(1, len(classes) + 1) if category_ids is None else category_ids


def coco_rows(detections: Sequence[Mapping[str, NDArray[Any]]]) -> NDArray[np.float64]:
    """(D, 7): image id, x, y, width, height, score, category id."""
    rows = [np.zeros((0, 7))]
    for i, found in enumerate(detections):
        corner, size = found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]
        ids = np.full(len(corner), float(i))
        rows.append(np.column_stack([ids, corner, size, found["scores"], found["labels"] + 1.0]))
    return np.concatenate(rows)


def _mask_results(detections: Sequence[Mapping[str, NDArray[Any]]]) -> list[dict[str, Any]]:
    results = []
    for i, found in enumerate(detections):
        given = found["masks"]
        masks = given if given.ndim == 1 else encode_masks(given.reshape(-1, *given.shape[-2:]) > 0.5)
        for label, score, mask in zip(found["labels"], found["scores"], masks, strict=True):
            results.append({
                "image_id": i, "category_id": int(label) + 1, "score": float(score), "segmentation": mask,
            })  # fmt: skip
    return results


def _result(numbers: Numbers) -> CocoResult:
    return CocoResult(**numbers.overall, per_class=numbers.per_class, per_class_AP50=numbers.per_class_AP50)


def _read(path: Path | str) -> Any:
    try:
        return json.loads(read_file(Path(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); give a COCO file") from error
