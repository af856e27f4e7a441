"""Boxes that are annotated twice, and objects too small for a model's input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detdistill.commands.check import check
from detdistill.data.box_checks import doubled_boxes, small_objects
from detdistill.data.inspect import inspect_data
from detdistill.data.records import Record, Records, Split
from detdistill.recipe import parse_recipe


def _split(boxes, labels=None, ignore=None, size=(480, 640)):
    """One image for each list of boxes."""
    records = []
    for i, rows in enumerate(boxes):
        boxes_K4 = np.array(rows, np.float32).reshape(-1, 4)
        count = len(boxes_K4)
        records.append(
            Record(
                image_id=i,
                path=Path(f"{i}.png"),
                height=size[0],
                width=size[1],
                boxes_K4=boxes_K4,
                labels_K=np.array(labels[i] if labels else [0] * count, np.int64),
                ignore_K=np.array(ignore[i] if ignore else [False] * count, np.bool_),
                areas_K=np.ones(count, np.float32),
            )
        )
    return Split("train", Records.pack(records), ("cat", "dog"), (0, 1), Path("train.json"), [])


A, B = [1, 2, 30, 40], [1, 2, 30, 40.5]


@pytest.mark.parametrize(
    ("boxes", "labels", "count", "images"),
    [
        ([[A, B], [A]], None, 0, 0),  # nearly the same, and the same on another image
        ([[A, A]], [[0, 1]], 0, 0),  # of two classes
        ([[], [B, A, A]], None, 1, 1),
        ([[A, B, A, B, A], [B, B]], None, 4, 2),
        ([[]], None, 0, 0),
    ],
)
def test_the_same_box_of_the_same_class_on_the_same_image_is_reported(boxes, labels, count, images):
    found = doubled_boxes(_split(boxes, labels))
    assert len(found) == (count > 0)
    if count:
        assert (
            f"{count} boxes on {images} images are annotated twice, as 'cat' (1, 2, 30, 40" in found[0].message
        )


def test_check_reports_boxes_that_are_annotated_twice(tmp_path, write_coco):
    box = {"image_id": 1, "category_id": 7, "bbox": [4, 6, 10, 20], "area": 200, "iscrowd": 0}
    write_coco(tmp_path / "train.json", tmp_path / "train", annotations=[{**box, "id": 1}, {**box, "id": 2}])
    found = inspect_data_kinds(tmp_path)
    assert found.count("doubled box") == 1


def inspect_data_kinds(root):
    config = parse_recipe({"data": str(root), "student": {}}).data
    return [finding.kind for finding in inspect_data(config).findings]


def _objects_of(sides):
    return [[[10, 10, 10 + side, 10 + side]] for side in sides]


def test_small_objects_are_counted_in_the_input():
    def halved(height, width):
        return 0.5, 0.5

    sides = [4] * 3 + [7] * 2 + [40] * 5  # in the input 2, 3.5 and 20 px: half of stride 8 is 4
    (finding,) = small_objects(_split(_objects_of(sides)), halved, 8, (240, 320))
    assert "50% of the objects of train are smaller than half the finest stride (8 / 2)" in finding.message
    assert "median side 2.0 px" in finding.message
    assert "student.size to [480, 640]" in finding.fix  # twice as large: 4 px become 8 / 2
    assert not small_objects(_split(_objects_of([8.5] * 9)), halved, 8, (240, 320))
    assert small_objects(_split(_objects_of([8.5] * 9)), halved, 16, (240, 320))


@pytest.mark.parametrize("count", [1, 49, 50, 51, 400])
def test_the_size_that_is_advised_cures_it(count):
    split = _split(_objects_of(np.random.default_rng(0).uniform(1, 19, count)))

    def found(short, long):
        return small_objects(split, lambda height, width: (short / height,) * 2, 8, (short, long))

    (finding,) = found(96, 128)
    short, long = (int(side) for side in finding.fix.split("[")[1].split("]")[0].split(","))
    assert not found(short, long)
    assert found(int(0.7 * short), int(0.7 * long))  # and it is not much more than needed


def test_ignored_objects_do_not_count():
    boxes = [[[0, 0, 2, 2], [0, 0, 50, 50]]]
    assert small_objects(_split(boxes), lambda h, w: (1.0, 1.0), 8, None)
    assert not small_objects(_split(boxes, ignore=[[True, False]]), lambda h, w: (1.0, 1.0), 8, None)
    assert not small_objects(_split(boxes, ignore=[[True, True]]), lambda h, w: (1.0, 1.0), 8, None)


def test_check_advises_a_size_with_which_it_is_silent(tmp_path, write_coco):
    for name in ("train", "val"):
        box = {"image_id": 1, "category_id": 7, "bbox": [4, 6, 6, 6], "area": 36, "iscrowd": 0, "id": 1}
        write_coco(tmp_path / f"{name}.json", tmp_path / name, annotations=[box])
    student = {"family": "fcos", "backbone": "mobilenetv3_small_050", "channels": 16, "size": [24, 32]}
    recipe = {"data": str(tmp_path), "student": student}
    (finding,) = [f for f in check(parse_recipe(recipe)).inspection.findings if f.kind == "small objects"]
    assert "median side 3.0 px" in finding.message
    size = [int(side) for side in finding.fix.split("[")[1].split("]")[0].split(",")]
    cured = check(parse_recipe({**recipe, "student": {**student, "size": size}}))
    assert not [f for f in cured.inspection.findings if f.kind == "small objects"]
