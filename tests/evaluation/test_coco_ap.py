"""COCO AP against pycocotools, and against the numbers known for the results that it ships."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detdistill.data.masks import encode_masks
from detdistill.errors import UserError
from detdistill.evaluation.coco import (
    COCO_NUMBERS,
    coco_ap,
    coco_ap_from_files,
    coco_results,
    coco_truth,
    result_rows,
)

BACKENDS = ["hotcoco", "pycocotools"]
REFERENCE = {  # of the README of the evaluator data; the last six of segm are the AR
    "bbox": [
        .504581, .696973, .572982, .585626, .519400, .501398,
        .386813, .593680, .595353, .639811, .566421, .564291,
    ],
    "segm": [
        .319545, .562288, .298927, .387374, .310183, .326934,
        .268230, .415449, .416839, .469450, .376759, .381472,
    ],
}  # fmt: skip


def is_one(value: float) -> bool:
    return value == pytest.approx(1)  # precision is 1 - 2e-16 at best


def summarized(split, detections) -> list[float]:
    """The 12 numbers as pycocotools itself says them, from dictionaries written here."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def row(i, label, box):
        x1, y1, x2, y2 = map(float, box)
        return {"image_id": i, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1]}

    truth, found = COCO(), COCO()
    annotations = [
        {**row(i, label, box), "area": float(area), "iscrowd": int(crowd)}
        for i, record in enumerate(split.records)
        for label, box, area, crowd in zip(
            record.labels_K, record.boxes_K4, record.areas_K, record.ignore_K, strict=True
        )
    ]
    truth.dataset = {
        "images": [{"id": i} for i in range(len(split))],
        "categories": [{"id": label, "name": name} for label, name in enumerate(split.classes)],
        "annotations": [{**a, "id": n} for n, a in enumerate(annotations, start=1)],
    }
    truth.createIndex()
    results = [
        {**row(i, label, box), "score": float(score)}
        for i, detection in enumerate(detections)
        for label, box, score in zip(detection["labels"], detection["boxes"], detection["scores"], strict=True)
    ]
    found = truth.loadRes(results)
    evaluator = COCOeval(truth, found, "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return [math.nan if value == -1 else value for value in evaluator.stats]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_random_sets_equal_pycocotools(seed, backend, random_split, random_detections):
    split = random_split(seed)
    detections = random_detections(split, seed)
    ours = coco_ap(split, detections, backend=backend)
    np.testing.assert_allclose(list(ours.as_dict().values()), summarized(split, detections), atol=1e-9)


def test_a_results_file_says_what_was_measured(random_split, random_detections, tmp_path: Path):
    """With the source's own ids of images and categories."""
    split = random_split(3)
    split = replace(
        split,
        category_ids=tuple(10 * q + 7 for q in range(len(split.classes))),
        records=[replace(record, image_id=5 * i + 2) for i, record in enumerate(split.records)],
    )
    detections = random_detections(split, 3)
    truth = coco_truth(split)
    for image, record in zip(truth["images"], split.records, strict=True):
        image["id"] = record.image_id
    for category, given in zip(truth["categories"], split.category_ids, strict=True):
        category["id"] = given
    for row in truth["annotations"]:
        row["image_id"] = split.records[row["image_id"]].image_id
        row["category_id"] = split.category_ids[row["category_id"] - 1]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    as_tensors = [{name: torch.as_tensor(value) for name, value in one.items()} for one in detections]
    (tmp_path / "found.json").write_text(json.dumps(coco_results(split, as_tensors)))
    of_file = coco_ap_from_files(tmp_path / "truth.json", tmp_path / "found.json")
    assert 0 < of_file.AP < 1
    assert math.isclose(of_file.AP, coco_ap(split, detections).AP)


def test_results_say_which_category_is_which():
    found = {
        "boxes": torch.tensor([[1.0, 2, 4, 8], [0, 0, math.inf, 1], [5, 5, 6, 6]]),
        "labels": torch.tensor([1, 0, 0]),
        "scores": torch.tensor([0.5, 0.9, 0.25]),
    }
    rows = result_rows(7, found, ("nut", "bolt"), (30, 10))
    assert rows == [  # without the box that is not finite, for which JSON has no word
        {"image_id": 7, "category_id": 10, "category": "bolt", "bbox": [1, 2, 3, 6], "score": 0.5},
        {"image_id": 7, "category_id": 30, "category": "nut", "bbox": [5, 5, 1, 1], "score": 0.25},
    ]
    rows = result_rows("a", found, ("nut", "bolt"), None)
    assert [(row["category_id"], row["category_id_is"]) for row in rows] == [(2, "label + 1"), (1, "label + 1")]


def test_backends_agree_by_class(random_split, random_detections):
    split = random_split(3, images=40)
    detections = random_detections(split, 3)
    fast, slow = (coco_ap(split, detections, backend=backend) for backend in BACKENDS)
    assert fast.per_class == pytest.approx(slow.per_class, abs=1e-9, nan_ok=True)
    assert fast.per_class_AP50 == pytest.approx(slow.per_class_AP50, abs=1e-9, nan_ok=True)
    assert list(fast.per_class) == list(split.classes)
    assert math.isnan(fast.per_class["cone"])
    np.testing.assert_allclose(fast.AP, np.nanmean(list(fast.per_class.values())), atol=1e-9)


@pytest.mark.real
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_reference_results(iou_type, backend, shared_data):
    folder = shared_data / "evaluator" / "coco"
    result = coco_ap_from_files(
        folder / "instances_val2014_100.json",
        folder / f"instances_val2014_fake{iou_type}100_results.json",
        iou_type,
        backend,
    )
    assert list(result.as_dict().values()) == pytest.approx(REFERENCE[iou_type], abs=1e-6)
    assert list(result.as_dict()) == list(COCO_NUMBERS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_is_zero(backend, random_split):
    split = random_split(1)
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}]
    result = coco_ap(split, nothing * len(split), backend=backend)
    assert result.AP == result.AR100 == 0
    assert "AP 0.000" in str(result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_objects_is_undefined(backend, make_record, make_split):
    split = make_split([make_record(1, [], [])])
    found = [{"boxes": [[0, 0, 9, 9]], "labels": [0], "scores": [0.5]}]
    result = coco_ap(split, found, backend=backend)
    assert all(math.isnan(value) for value in result.as_dict().values())
    assert "AP –" in str(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_any_type(dtype, make_record, make_split):
    split = make_split([make_record("a", [[8, 8, 40, 48]], [1])])
    boxes = torch.tensor([[8, 8, 40, 48]], dtype=dtype, requires_grad=True)
    found = [{"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.5], dtype=dtype)}]
    assert is_one(coco_ap(split, found).AP)


def test_not_finite_is_dropped_and_counted(make_record, make_split):
    split = make_split([make_record(1, [[10, 10, 50, 50]], [0])])
    found = {
        "boxes": np.array([[np.nan, 0, 9, 9], [10, 10, 50, 50], [10, 10, np.inf, 50], [10, 10, 50, 50]]),
        "labels": np.zeros(4, dtype=int),
        "scores": np.array([0.9, 0.8, 0.7, np.nan]),
    }
    with pytest.warns(UserWarning, match="3 detections"):
        assert is_one(coco_ap(split, [found]).AP)


def test_crowd_absorbs_detections(make_record, make_split):
    crowd = make_record(1, [[10, 10, 50, 50], [100, 10, 290, 190]], [0, 0], ignore=[False, True])
    inside_crowd = [[110, 20, 150, 60], [200, 100, 240, 140]]
    found = {
        "boxes": [*inside_crowd, [10, 10, 50, 50]], "labels": [0, 0, 0], "scores": [0.9, 0.8, 0.7],
    }  # fmt: skip
    assert is_one(coco_ap(make_split([crowd]), [found]).AP)
    not_crowd = replace(crowd, ignore_K=np.zeros(2, dtype=bool))
    assert coco_ap(make_split([not_crowd]), [found]).AP < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend, make_record, make_split):
    square = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
    record = replace(make_record(1, [[10, 10, 30, 30]], [0]), masks=(square,))
    mask = torch.zeros(1, 1, record.height, record.width)
    mask[..., 10:30, 10:30] = 0.9
    box_elsewhere = {"boxes": torch.tensor([[90.0, 90, 99, 99]]), "labels": torch.tensor([0])}
    found = [{**box_elsewhere, "scores": torch.tensor([0.5]), "masks": mask}]
    assert is_one(coco_ap(make_split([record]), found, "segm", backend).AP)
    assert coco_ap(make_split([record]), found, "bbox", backend).AP == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_as_run_lengths_are_what_their_pixels_are(backend, make_record, make_split):
    rng = np.random.default_rng(0)
    records, pixels, lengths = [], [], []
    for i in range(8):
        corner, side = rng.integers(0, 60, (4, 2)), rng.integers(20, 80, (4, 2))
        boxes = np.concatenate([corner, corner + side], axis=1)
        truth, masks = np.zeros((2, 4, 200, 300), dtype=bool)
        for whole, part, (x1, y1, x2, y2) in zip(truth, masks, boxes, strict=True):
            whole[y1:y2, x1:x2] = True
            part[y1 : y2 - rng.integers(0, 9), x1:x2] = True
        record = make_record(i, boxes, rng.integers(0, 2, 4))
        records.append(replace(record, masks=tuple(encode_masks(truth))))
        found = {"boxes": boxes, "labels": record.labels_K, "scores": rng.random(4)}
        pixels.append({**found, "masks": masks[:, None].astype(np.float32)})
        lengths.append({**found, "masks": encode_masks(masks)})
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0).long(),
        "scores": torch.zeros(0),
        "masks": [],
    }
    pixels[3], lengths[3] = {**nothing, "masks": torch.zeros(0, 1, 200, 300)}, nothing
    split = make_split(records)
    one, other = (coco_ap(split, found, "segm", backend).as_dict() for found in (pixels, lengths))
    assert one == pytest.approx(other, nan_ok=True)
    assert one["AP"] == pytest.approx(0.6, abs=0.35)
    assert one["AP"] < coco_ap(split, lengths, "bbox", backend).AP


def test_errors(make_record, make_split, tmp_path: Path):
    with pytest.raises(UserError, match=r"annotations\.json.*no images"):
        coco_ap(make_split([]), [])
    split = make_split([make_record(1, [[1, 1, 9, 9]], [0])])
    with pytest.raises(ValueError, match="0 detections for 1 images"):
        coco_ap(split, [])
    with pytest.raises(ValueError, match="labels 3…3 for 3 classes"):
        coco_ap(split, [{"boxes": [[1, 1, 9, 9]], "labels": [3], "scores": [1.0]}])
    with pytest.raises(UserError, match="no masks"):
        coco_ap(split, [{"boxes": [], "labels": [], "scores": []}], "segm")


def test_file_errors(tmp_path: Path):
    truth, results = tmp_path / "truth.json", tmp_path / "results.json"
    with pytest.raises(UserError, match=r"truth\.json: no such file"):
        coco_ap_from_files(truth, results)
    truth.write_text(json.dumps({"images": [{"id": 1}], "annotations": [], "categories": []}))
    results.write_text("{}")
    with pytest.raises(UserError, match=r"results\.json: not COCO results"):
        coco_ap_from_files(truth, results)
    results.write_text(json.dumps([{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]))
    with pytest.raises(UserError, match=r"1 image ids \(as 7\) are not in"):
        coco_ap_from_files(truth, results)
