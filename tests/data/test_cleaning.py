"""Whatever boxes come in, those that come out are inside the image and not empty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detdistill.data.cleaning import RawObject, make_record, select_classes, settle_masks
from detdistill.data.formats.yolo import read_yolo
from detdistill.data.records import Finding, Split
from detdistill.errors import UserError

_NUMBER = st.one_of(st.floats(), st.floats(-50, 150), st.integers(-5, 105).map(float), st.just(1e-9))
_SOURCE = Path("labels.json")


def _record(boxes, masks=None, size=(80, 100)):
    findings: list[Finding] = []
    objects = [RawObject(box, 0, f"object {k}", mask=masks and masks[k]) for k, box in enumerate(boxes)]
    return make_record(1, Path("1.jpg"), size, objects, _SOURCE, findings), findings


@given(st.lists(st.tuples(_NUMBER, _NUMBER, _NUMBER, _NUMBER), max_size=8))
def test_surviving_boxes_are_inside_and_not_empty(boxes):
    record, findings = _record(boxes)
    kept = record.boxes_K4
    assert kept.dtype == np.float32
    assert np.isfinite(kept).all()
    assert (kept[:, :2] >= 0).all()
    assert (kept[:, 2] <= 100).all()
    assert (kept[:, 3] <= 80).all()
    assert (kept[:, 2:] > kept[:, :2]).all()
    assert (record.areas_K > 0).all()
    dropped = [finding for finding in findings if finding.kind != "box clipped"]
    assert len(kept) + len(dropped) == len(boxes)


@pytest.mark.parametrize(
    ("box", "kinds", "kept"),
    [
        ((1, 2, 3, 4), [], [1, 2, 3, 4]),
        ((-0.4, 0, 100.6, 80), [], [0, 0, 100, 80]),  # rounding is not worth a word
        ((-5, 10, 20, 30), ["box clipped"], [0, 10, 20, 30]),
        ((5, 5, 5, 9), ["zero-size box"], None),
        ((9, 5, 5, 9), ["zero-size box"], None),
        ((120, 5, 130, 9), ["box outside image"], None),
        ((float("nan"), 5, 30, 9), ["box not finite"], None),
        ((0, 5, float("inf"), 9), ["box not finite"], None),
    ],
)
def test_each_fault_has_its_name(box, kinds, kept):
    record, findings = _record([box])
    assert [finding.kind for finding in findings] == kinds
    assert record.boxes_K4.tolist() == ([kept] if kept else [])
    assert all("object 0" in str(finding) and "labels.json" in str(finding) for finding in findings)


def test_a_few_missing_masks_are_filled_with_the_box_and_many_end_all_masks():
    square = [[0, 0, 10, 0, 10, 10, 0, 10]]
    boxes = [(0, 0, 10, 10)] * 3
    findings: list[Finding] = []
    few, _ = _record(boxes, [square, square, [[1, 2]]])
    (settled,) = settle_masks([few], _SOURCE, findings)
    assert list(settled.masks) == [square] * 3
    many, _ = _record(boxes, [square, None, None])
    (settled,) = settle_masks([many], _SOURCE, findings)
    assert settled.masks is None
    assert [finding.kind for finding in findings] == ["missing mask", "too few masks"]


def test_classes_are_selected_in_the_order_asked_for():
    record, _ = _record([(0, 0, 10, 10)] * 3)
    record.labels_K[:] = [0, 1, 2]
    split = Split("train", [record], ("ant", "bee", "cow"), (3, 5, 8), _SOURCE)
    chosen = select_classes(split, ["cow", "ant"])
    assert chosen.classes == ("cow", "ant")
    assert chosen.category_ids == (8, 3)
    assert chosen.records[0].labels_K.tolist() == [1, 0]
    with pytest.raises(UserError, match="did you mean 'cow'"):
        select_classes(split, ["cows"])
    with pytest.raises(UserError, match="twice"):
        select_classes(split, ["cow", "cow"])


def test_a_lone_class_name_is_not_read_as_its_letters(tmp_path):
    split = Split("train", [], ("c", "a", "t"), None, _SOURCE)
    for read in (lambda: select_classes(split, "cat"), lambda: read_yolo(tmp_path, "train", "cat")):
        with pytest.raises(UserError, match="classes is the word 'cat': give a list of them"):
            read()
