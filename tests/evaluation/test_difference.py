"""What two detectors find otherwise, on cases laid out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from detdistill.errors import UserError
from detdistill.evaluation.difference import counts, difference

BIG, SMALL, FAR = [20.0, 20, 80, 80], [100.0, 20, 110, 30], [150.0, 100, 190, 140]


def found(*rows):
    boxes, labels, scores = zip(*rows, strict=True) if rows else ([], [], [])
    return {"boxes": np.reshape(boxes, (-1, 4)), "labels": np.array(labels, int), "scores": np.array(scores)}


def test_each_kind_of_change(make_record, make_split):
    split = make_split([make_record(0, [BIG, SMALL], [0, 1])])
    before = [found((BIG, 0, 0.9), (FAR, 2, 0.6))]
    after = [found((SMALL, 1, 0.9), (FAR, 1, 0.7))]
    (image,) = difference(split, before, after)
    assert [(c.kind, c.box, c.label) for c in image.changes] == [
        ("found", tuple(SMALL), 1),
        ("lost", tuple(BIG), 0),
        ("new false alarm", tuple(FAR), 1),
        ("gone false alarm", tuple(FAR), 2),
    ]
    assert image.changes[0].area == 100
    assert [c.score for c in image.changes[2:]] == [0.7, 0.6]
    assert counts([image]) == {"found": 1, "lost": 1, "new false alarm": 1, "gone false alarm": 1}


def test_the_same_is_no_difference(make_record, make_split, random_split, random_detections):
    split = random_split(0)
    detections = random_detections(split, 1)
    assert difference(split, detections, detections) == []
    # A false alarm that moves a little is the same one, and so is an object found by another box.
    one = make_split([make_record(0, [BIG], [0])])
    moved = [found(([22.0, 20, 82, 80], 0, 0.5), ([151.0, 100, 191, 140], 1, 0.4))]
    assert difference(one, [found((BIG, 0, 0.9), (FAR, 1, 0.9))], moved) == []


def test_score_overlap_and_class_decide(make_record, make_split):
    split = make_split([make_record(0, [BIG], [0])])
    nothing = [found()]
    assert difference(split, nothing, [found((BIG, 0, 0.29))]) == []
    for row in ((BIG, 1, 0.9), ([50.0, 20, 110, 80], 0, 0.9)):  # another class; IoU 1/3
        (image,) = difference(split, nothing, [found(row)])
        assert [c.kind for c in image.changes] == ["new false alarm"]
    (image,) = difference(split, nothing, [found((BIG, 0, 0.29))], threshold=0.2)
    assert image.count("found") == 1


def test_a_second_box_on_an_object_is_a_false_alarm(make_record, make_split):
    split = make_split([make_record(0, [BIG], [0])])
    (image,) = difference(split, [found((BIG, 0, 0.9))], [found((BIG, 0, 0.9), (BIG, 0, 0.8))])
    assert [(c.kind, c.score) for c in image.changes] == [("new false alarm", 0.8)]


def test_ignored_objects_are_neither_found_nor_false(make_record, make_split):
    split = make_split([make_record(0, [BIG], [0], [True])])
    assert difference(split, [found()], [found((BIG, 0, 0.9), (BIG, 0, 0.8))]) == []


def test_small_objects_come_first_and_false_alarms_last(make_record, make_split):
    split = make_split([make_record(i, [box], [0]) for i, box in enumerate([BIG, SMALL, FAR, BIG])])
    before = [found() for _ in range(4)]
    after = [found((BIG, 0, 0.9)), found((SMALL, 0, 0.9)), found((BIG, 0, 0.9)), found()]
    assert [image.index for image in difference(split, before, after)] == [1, 0, 2]


def test_the_libraries_agree(random_split, random_detections):
    split = random_split(5, 20)
    sides = random_detections(split, 1), random_detections(split, 2)
    mine = difference(split, *sides)
    assert all(counts(mine).values())
    assert repr(mine) == repr(difference(split, *sides, backend="pycocotools"))
    there, back = counts(mine), counts(difference(split, *sides[::-1]))
    assert (there["found"], there["lost"]) == (back["lost"], back["found"])
    assert there["new false alarm"] == back["gone false alarm"]


def test_an_empty_split_is_refused(make_split):
    with pytest.raises(UserError, match="no images to compare"):
        difference(make_split([]), [], [])
