"""Values as exporters write them: text for numbers, NaN, masks that cannot be decoded."""

from __future__ import annotations

import copy
import json
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as oracle
from pycocotools.coco import COCO

from detdistill.data.formats.coco import read_coco
from detdistill.data.inspect import inspect_data
from detdistill.data.loading import DetectionDataset, open_data
from detdistill.errors import UserError
from detdistill.evaluation.coco import coco_results
from detdistill.models import build_model
from detdistill.recipe import DataConfig

_SQUARE = [[4.0, 6.0, 14.0, 6.0, 14.0, 26.0, 4.0, 26.0]]
_BITMAP = np.zeros((48, 64), np.uint8)
_BITMAP[6:26, 4:14] = 1
_COMPRESSED = oracle.encode(np.asfortranarray(_BITMAP))
_RUNS = [len(list(run)) for _, run in groupby(_BITMAP.ravel(order="F").tolist())]
_RLE = {"size": [48, 64], "counts": _COMPRESSED["counts"].decode()}


def _box(number, **changes):
    plain = {"id": number, "image_id": 1, "category_id": 7, "bbox": [4, 6, 10, 20], "area": 150, "iscrowd": 0}
    return {**plain, **changes}


def _read(tmp_path, write_coco, annotations, **changes):
    file = write_coco(tmp_path / "train.json", tmp_path, annotations=annotations, **changes)
    return read_coco(file, tmp_path, "train")


# --- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "ignored", "kinds"),
    [
        ("0", False, []),
        ("1", True, []),
        ("False", False, []),
        ("true", True, []),
        (0.0, False, []),
        (1.0, True, []),
        (True, True, []),
        (None, False, []),
        (float("nan"), False, ["malformed iscrowd"]),
        ("crowd", False, ["malformed iscrowd"]),
        (0.5, False, ["malformed iscrowd"]),
        (-1, False, ["malformed iscrowd"]),
        (2, False, ["malformed iscrowd"]),
        ("2", False, ["malformed iscrowd"]),
        ([1], False, ["malformed iscrowd"]),
    ],
)
def test_iscrowd_is_a_number_however_it_is_written(tmp_path, write_coco, value, ignored, kinds):
    split = _read(tmp_path, write_coco, [_box(1, iscrowd=value), _box(2)])
    assert split.records[0].ignore_K.tolist() == [ignored, False]
    assert list(split.warning_counts()) == kinds


@pytest.mark.parametrize(
    ("value", "area", "kinds"),
    [
        ("150.5", 150.5, []),
        (None, 200, []),
        (0, 200, ["malformed area"]),
        (-3.5, 200, ["malformed area"]),
        (1e300, 200, ["malformed area"]),
        (float("nan"), 200, ["malformed area"]),
        (float("inf"), 200, ["malformed area"]),
        (10**400, 200, ["malformed area"]),
        ("large", 200, ["malformed area"]),
    ],
)
def test_an_area_is_a_number_or_that_of_the_box(tmp_path, write_coco, value, area, kinds):
    split = _read(tmp_path, write_coco, [_box(1, area=value)])
    assert split.records[0].areas_K.tolist() == [area]
    assert list(split.warning_counts()) == kinds


def test_ids_and_boxes_may_be_text(tmp_path, write_coco):
    categories = [{"id": "7", "name": "cat"}, {"id": 9.0, "name": "dog"}]
    boxes = [_box("a", category_id="7", bbox=["4", "6", 10, "20"]), _box(2, category_id=9)]
    split = _read(tmp_path, write_coco, boxes, categories=categories)
    assert split.findings == []
    assert split.category_ids == ("7", 9)
    assert split.numeric_ids == (7, 9)
    assert split.records[0].labels_K.tolist() == [0, 1]
    assert split.records[0].boxes_K4[0].tolist() == [4, 6, 14, 26]


def test_results_have_ids_as_the_data_write_them(tmp_path, write_coco):
    categories = [{"id": "7", "name": "cat"}, {"id": "10", "name": "dog"}]
    write_coco(tmp_path / "train.json", tmp_path, categories=categories)
    write_coco(tmp_path / "val.json", tmp_path, categories=categories[:1], images=1)
    val = open_data(DataConfig(root=tmp_path))["val"]
    found = {"boxes": torch.ones(2, 4), "labels": torch.tensor([1, 0]), "scores": torch.ones(2)}
    assert [row["category_id"] for row in coco_results(val, [found])] == ["10", "7"]


def test_bad_areas_are_one_warning_with_their_number(tmp_path, write_coco):
    split = _read(tmp_path, write_coco, [_box(k, area=area) for k, area in enumerate([0, 150, -1, "x"], 1)])
    (finding,) = split.findings
    assert "the area of 3 annotations is not a number above 0" in finding.message


@pytest.mark.parametrize("bbox", ["1234", {"1": 0, "2": 0, "3": 0, "4": 0}, [1, 2, 3], None])
def test_a_bbox_that_is_no_list_of_four_is_dropped(tmp_path, write_coco, bbox):
    split = _read(tmp_path, write_coco, [_box(1, bbox=bbox), _box(2)])
    assert split.warning_counts() == {"malformed box": 1}
    assert len(split.records.labels_M) == 1


def test_most_objects_ignored_is_a_warning(tmp_path, write_coco):
    for flags, warned in (([1, 1, 0], True), ([1, 0], False)):
        write_coco(
            tmp_path / "train.json", tmp_path, annotations=[_box(k, iscrowd=v) for k, v in enumerate(flags, 1)]
        )
        kinds = open_data(DataConfig(root=tmp_path))["train"].warning_counts()
        assert ("ignored objects" in kinds) == warned


@pytest.mark.parametrize(
    ("boxes", "severity"),
    [
        ([[0.1, 0.2, 0.5, 0.5]] * 2, "error"),
        ([[0, 0, 1, 1]] * 2, "error"),
        ([[0.6, 0.7, 0.9, 0.9]] * 2, "error"),  # corners, read as sides
        ([[0.1, 0.2, 0.5, 0.5], [4, 6, 10, 20], [4, 6, 9, 20]], "warning"),
        ([[0.1, 0.2, 0.5, 20]] * 2, None),  # a pole
    ],
)
def test_boxes_in_fractions_are_called_so(tmp_path, write_coco, boxes, severity):
    write_coco(tmp_path / "train.json", tmp_path, annotations=[_box(k, bbox=b) for k, b in enumerate(boxes, 1)])
    findings = open_data(DataConfig(root=tmp_path))["train"].findings
    found = [finding for finding in findings if finding.kind == "normalized box"]
    assert [finding.severity for finding in found] == ([severity] if severity else [])
    assert not found or "must be in pixels" in str(found[0])


# --- the fast way and the other --------------------------------------------------------------------------


def test_odd_rows_change_nothing_for_the_others(tmp_path, write_coco):
    """One odd row sends its neighbors, and NaN the whole file, another way: what is read is the same."""
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 20, (1500, 4)).round(2).tolist()
    rows = [
        _box(k + 1, image_id=k % 5 + 1, bbox=[x, y, w, h], segmentation=[[x, y, x + w, y, x + w, y + h]])
        for k, (x, y, w, h) in enumerate(boxes)
    ]
    plain = _read(tmp_path, write_coco, rows, images=5).records
    for odd in (_box(0, iscrowd="0", image_id=99), _box(0, image_id=99, area=float("nan"))):
        split = _read(tmp_path, write_coco, [*rows[:700], odd, *rows[700:]], images=5)
        assert split.warning_counts()["unknown image"] == 1
        records = split.records
        for name in ("boxes_M4", "labels_M", "ignore_M", "areas_M", "firsts"):
            np.testing.assert_array_equal(getattr(records, name), getattr(plain, name))
        assert list(records.masks) == list(plain.masks)


def test_ids_areas_and_crowds_are_those_of_pycocotools(tmp_path, write_coco):
    rng = np.random.default_rng(1)
    rows = [
        _box(k + 1, image_id=int(rng.integers(1, 6)), area=float(rng.uniform(1, 99)), iscrowd=int(k % 3 == 0))
        for k in range(40)
    ]
    split = _read(tmp_path, write_coco, rows, images=5)
    coco = COCO(tmp_path / "train.json")
    for record in split.records:
        theirs = coco.loadAnns(coco.getAnnIds(imgIds=[record.image_id]))
        np.testing.assert_array_equal(record.areas_K, np.float32([row["area"] for row in theirs]))
        assert record.ignore_K.tolist() == [bool(row["iscrowd"]) for row in theirs]


@pytest.mark.parametrize("start", ["\ufeff", ""])
def test_a_byte_order_mark_is_no_obstacle(tmp_path, write_coco, start):
    file = write_coco(tmp_path / "train.json", tmp_path)
    file.write_text(start + file.read_text(), encoding="utf-8")
    assert len(read_coco(file, tmp_path, "train").records.labels_M) == 1


_ODD = st.sampled_from(
    ["1e400", "9" * 400, "NaN", "null", "[1]", '"a\\u0000b/c.jpg"', '"\\ud800/c.jpg"', "{}", "-1", '""', "true"]
)
_KEYS = st.sampled_from(
    [
        *[("images", key) for key in ("id", "file_name", "height", "width")],
        *[("annotations", key) for key in _box(1, segmentation=None)],
        *[("categories", key) for key in ("id", "name", "supercategory")],
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_KEYS, _ODD)
def test_no_value_ends_in_a_traceback(tmp_path, write_coco, where, value):
    file = write_coco(tmp_path / "train.json", tmp_path, annotations=[_box(1), _box(2)])
    tree = json.loads(file.read_text())
    tree[where[0]][0][where[1]] = "@@"
    file.write_text(json.dumps(tree).replace('"@@"', value))
    try:
        lines = [str(finding) for finding in inspect_data(DataConfig(root=tmp_path)).findings]
    except UserError as error:
        lines = [str(error)]
        named = "train.json" in lines[0]
    else:
        named = True
    assert named
    assert not any("\n" in line for line in lines)
    "".join(lines).encode()


# --- classes ---------------------------------------------------------------------------------------------


def test_roboflows_group_may_have_the_name_of_a_class(tmp_path, write_coco):
    categories = [
        {"id": 0, "name": "red", "supercategory": "none"},
        {"id": 7, "name": "red", "supercategory": "red"},
        {"id": 8, "name": "blue", "supercategory": "red"},
    ]
    split = _read(tmp_path, write_coco, [_box(1)], categories=categories)
    assert split.classes == ("red", "blue")
    assert split.records[0].labels_K.tolist() == [0]
    categories[0]["supercategory"] = "colors"
    with pytest.raises(UserError, match="two categories have the name 'red'"):
        _read(tmp_path, write_coco, [_box(1)], categories=categories)


def test_names_composed_and_decomposed_meet(tmp_path, write_coco, write_image):
    file = write_coco(tmp_path / "train.json", tmp_path)
    tree = json.loads(file.read_text())
    tree["images"][0]["file_name"] = "Caf\u00e9.png"
    file.write_text(json.dumps(tree))
    image = write_image(tmp_path / "Cafe\u0301.png")
    split = read_coco(file, tmp_path, "train")
    assert split.errors == []
    assert split.records[0].path == image


# --- masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [48, 64], "counts": "!!!bad!!!"},
        {"size": [48, 64], "counts": "0"},
        {"size": [48, 64], "counts": _RLE["counts"][:-1]},
        {"size": [64, 48], "counts": _RLE["counts"]},
        {"size": [48, 64], "counts": [5, 6]},
        {"size": [48, 64]},
        [4, 6, 14, 6, 14, 26],
        [[4, 6, 14, 6]],
        [["4", "6", "14", "6", "14", "26"]],
        [[4, 6, 14, 6, 14, None]],
        "4 6 14 6",
    ],
)
def test_a_mask_that_cannot_be_decoded_is_reported_and_its_box_stands_in(tmp_path, write_coco, segmentation):
    whole = [_box(k, segmentation=_SQUARE) for k in (1, 2)]
    split = _read(tmp_path, write_coco, [*whole, _box(3, segmentation=segmentation)])
    assert split.warning_counts() == {"unusable mask": 1, "missing mask": 1}
    assert any("annotation 3 of image 1" in str(finding) for finding in split.findings)
    assert list(split.records[0].masks)[2] == _SQUARE  # the box has its corners


@pytest.mark.parametrize("counts", [_RLE["counts"], _RUNS])
def test_run_lengths_are_kept(tmp_path, write_coco, counts):
    rle = {"size": [48, 64], "counts": counts}
    split = _read(tmp_path, write_coco, [_box(1, segmentation=rle)])
    assert split.findings == []
    _, target = DetectionDataset(split, None, with_masks=True)[0]
    np.testing.assert_array_equal(target["masks"][0].numpy(), _BITMAP.astype(bool))


def test_a_dropped_polygon_is_counted(tmp_path, write_coco):
    split = _read(tmp_path, write_coco, [_box(1, segmentation=[*_SQUARE, [1, 2, 3, 4]])])
    assert split.warning_counts() == {"polygon dropped": 1}
    assert list(split.records[0].masks) == [_SQUARE]


_SMALL = np.zeros((48, 64), np.uint8)
_SMALL[30:33, 40:43] = 1


@pytest.mark.parametrize(
    ("segmentation", "dropped"),
    [
        ([[40, 6, 50, 6, 50, 26]], True),
        ([[400, 600, 410, 600, 410, 620]], True),  # outside the image
        ([[0.06, 0.12, 0.22, 0.12, 0.22, 0.54]], True),  # in fractions of the image
        ([[0, 0, 64, 0, 64, 48]], True),  # of all the image
        ({"size": [48, 64], "counts": oracle.encode(np.asfortranarray(_SMALL))["counts"].decode()}, True),
        ({"size": [48, 64], "counts": [48 * 64]}, True),  # no pixel
        ([[4, 6, 9, 6, 9, 16]], False),  # a quarter of the box
        ([[4, 6, 9, 6, 9, 11], [9, 11, 14, 11, 14, 26]], False),
        ([[-900, 6, 14, 6, 14, 26]], False),  # cut to the image first, as boxes are
    ],
)
def test_a_mask_far_from_its_box_is_dropped_and_its_box_stands_in(tmp_path, write_coco, segmentation, dropped):
    whole = [_box(k, segmentation=_SQUARE) for k in (1, 2)]
    split = _read(tmp_path, write_coco, [*whole, _box(3, segmentation=segmentation)])
    assert split.warning_counts() == ({"misplaced mask": 1, "missing mask": 1} if dropped else {})
    assert list(split.records[0].masks) == [_SQUARE, _SQUARE, _SQUARE if dropped else segmentation]
    assert not dropped or "annotation 3 of image 1 has its mask at" in str(split.findings[0])


def test_where_all_masks_are_far_from_their_boxes_the_message_says_so(tmp_path, write_coco):
    far = [_box(k, segmentation=[[40, 6, 50, 6, 50, 26]]) for k in (1, 2, 3)]
    split = _read(tmp_path, write_coco, far)
    assert not split.has_masks
    assert split.warning_counts() == {"misplaced mask": 3, "too few masks": 1}
    assert len(split.records.labels_M) == 3


def test_where_all_masks_are_unusable_the_message_says_so(tmp_path, write_coco):
    flat = [_box(k, segmentation=_SQUARE[0]) for k in (1, 2, 3)]
    split = _read(tmp_path, write_coco, flat)
    assert not split.has_masks
    assert any("3 have a segmentation that cannot be decoded" in str(finding) for finding in split.findings)
    nothing = _read(tmp_path, write_coco, [_box(k, segmentation=[]) for k in (1, 2, 3)])
    assert nothing.findings == []


_VALUES = st.one_of(st.floats(-1e6, 1e6), st.integers(-5, 99), st.sampled_from(["7", None, 1e300, 10**30]))
_SEGMENTATIONS = st.one_of(
    st.lists(st.lists(_VALUES, min_size=4, max_size=9), max_size=3),
    st.just(_SQUARE),
    st.builds(
        lambda size, counts: {"size": size, "counts": counts},
        st.sampled_from([[48, 64], [64, 48], [48.0, 64], None, [True, 3072]]),
        st.one_of(
            st.text("0123456789PQRabcdo", max_size=6),
            st.just(_RLE["counts"]),
            st.lists(st.sampled_from([0, 72, 3000, 3072, -1, 1.0]), max_size=4),
        ),
    ),
    st.sampled_from([None, "text", 5, [], {}, [[]], [[[1]]], [1, 2, 3, 4, 5, 6]]),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("mask_rcnn", 2, backbone="resnet18", channels=8).train()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_SEGMENTATIONS, min_size=1, max_size=3))
def test_what_check_accepts_a_training_step_accepts(tmp_path, write_coco, model, segmentations):
    given_ = copy.deepcopy(segmentations)
    # As many good ones, so that masks are used.
    rows = [_box(k, segmentation=one) for k, one in enumerate([*given_, *[_SQUARE] * len(given_)], 1)]
    write_coco(tmp_path / "train.json", tmp_path, annotations=[*rows, _box(99, segmentation=_SQUARE)])
    split = inspect_data(DataConfig(root=tmp_path)).splits["train"]
    assert split.errors == []
    assert split.has_masks
    image, target = DetectionDataset(split, None, with_masks=True)[0]
    assert len(target["masks"]) == len(rows) + 1
    losses = model([image], [target])
    assert all(loss.isfinite() for loss in losses.values())
    # What was given and is not in the masks was reported.
    kept = sum(list(split.records[0].masks)[k] == one for k, one in enumerate(given_))
    empty = sum(one in (None, [], {}, [[]]) for one in given_)
    counts = split.warning_counts()
    dropped = counts["unusable mask"] + counts["misplaced mask"] + counts["polygon dropped"]
    assert dropped >= len(given_) - kept - empty
