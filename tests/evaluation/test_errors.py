"""The decomposition of precision and TIDE: each kind of error planted alone, by hand, and real COCO boxes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from detdistill.data.records import Record
from detdistill.errors import UserError
from detdistill.evaluation.coco import coco_ap
from detdistill.evaluation.errors import KINDS, error_curves, supercategories_of, tide_errors

KINDS_OF = {"ball": "toy", "box": "toy", "cone": "road"}
OBJECT = [20.0, 20, 60, 60]  # 40 × 40: medium


def bands(under):
    """What each kind of error costs: the differences of neighboring curves, those that are not 0."""
    steps = {KINDS[0]: under[KINDS[0]]} | {b: under[b] - under[a] for a, b in pairwise(KINDS)}
    return {kind: pytest.approx(cost) for kind, cost in steps.items() if abs(cost) > 1e-9}


def found(*rows):
    boxes, labels, scores = zip(*rows, strict=True) if rows else ([], [], [])
    return {"boxes": np.reshape(boxes, (-1, 4)), "labels": np.array(labels, int), "scores": np.array(scores)}


@pytest.fixture
def one_of_each(make_record, make_split):
    """Three images with an object each: ball, box, cone."""
    return make_split([make_record(i, [OBJECT], [i]) for i in range(3)])


PERFECT = [found((OBJECT, label, 0.8)) for label in range(3)]


# Of 40 × 40: shifted by 10, IoU is 30 / 50 = 0.6; by 20, 20 / 60 = 1/3; by 35, 5 / 75 = 0.07.
@pytest.mark.parametrize(("x", "kind"), [(0, "C75"), (10, "C50"), (20, "Loc"), (35, "Oth")])
def test_a_shifted_box_is_an_error_of_its_place(x, kind, one_of_each):
    ball = [20.0 + x, 20, 60 + x, 60]
    curves = error_curves(one_of_each, [found((ball, 0, 0.8)), *PERFECT[1:]], KINDS_OF)
    if kind == "Oth":  # too far: a false alarm and a missed object, and the whole of AP is missed
        assert bands(curves.under(name="ball")) == {"FN": 1}
    else:
        assert bands(curves.under(name="ball")) == {kind: 1}
    assert bands(curves.under(name="box")) == {"C75": 1}
    assert curves.under()["C75"] == pytest.approx(1 if kind == "C75" else 2 / 3)


@pytest.mark.parametrize(("image", "kind"), [(1, "Sim"), (2, "Oth")])
def test_a_wrong_class_is_a_confusion(image, kind, one_of_each):
    """A ball is called on the box (alike) or on the cone (not alike), surer than the real: precision 1/2."""
    detections = [dict(one) for one in PERFECT]
    detections[image] = found((OBJECT, image, 0.8), (OBJECT, 0, 0.9))
    curves = error_curves(one_of_each, detections, KINDS_OF)
    assert bands(curves.under(name="ball")) == {"C75": 0.5, kind: 0.5}
    assert bands(curves.under(name="cone")) == {"C75": 1}
    unknown = error_curves(one_of_each, detections)
    assert not unknown.has_similar
    assert bands(unknown.under(name="ball")) == {"C75": 0.5, "Oth": 0.5}


def test_a_box_on_background(one_of_each):
    detections = [found((OBJECT, 0, 0.8), ([100.0, 100, 140, 140], 0, 0.9)), *PERFECT[1:]]
    curves = error_curves(one_of_each, detections, KINDS_OF)
    assert bands(curves.under(name="ball")) == {"C75": 0.5, "BG": 0.5}


def test_a_missed_object(make_record, make_split):
    split = make_split([make_record(i, [OBJECT], [0]) for i in range(2)])
    curves = error_curves(split, [PERFECT[0], found()])
    # One of two found: precision 1 at recalls 0, 0.01, …, 0.50, which are 51 of 101.
    assert bands(curves.under()) == {"C75": 51 / 101, "FN": 50 / 101}
    assert bands(curves.under("medium")) == {"C75": 51 / 101, "FN": 50 / 101}
    assert np.isnan(curves.under("small")["FN"])
    assert np.isnan(curves.under(name="cone")["C75"])


def test_sizes_are_apart(make_record, make_split):
    split = make_split([make_record(0, [OBJECT, [100, 100, 110, 110]], [0, 0])])
    curves = error_curves(split, [found((OBJECT, 0, 0.9))])
    assert bands(curves.under("medium")) == {"C75": 1}
    assert bands(curves.under("small")) == {"FN": 1}


def test_the_first_curves_are_coco_ap_and_the_libraries_agree(random_split, random_detections):
    split = random_split(3, 20)
    detections = random_detections(split, 4)
    curves = error_curves(split, detections, KINDS_OF)
    coco = coco_ap(split, detections)
    assert curves.under()["C75"] == pytest.approx(coco.AP75)
    assert curves.under()["C50"] == pytest.approx(coco.AP50)
    other = error_curves(split, detections, KINDS_OF, backend="pycocotools")
    np.testing.assert_allclose(curves.precision_KAQR, other.precision_KAQR)
    assert curves.under("small")["C50"] < curves.under("small")["BG"]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("Cls", (OBJECT, 1, 0.9)),
        ("Loc", ([40.0, 20, 80, 60], 0, 0.9)),
        ("Both", ([40.0, 20, 80, 60], 1, 0.9)),
        ("Bkg", ([100.0, 100, 140, 140], 0, 0.9)),
    ],
)
def test_tide_names_a_planted_error(kind, row, one_of_each):
    """One wrong detection, and the object on its image is not found otherwise."""
    errors = tide_errors(one_of_each, [found(row), *PERFECT[1:]])
    missed = {"Miss": 1} if kind in ("Both", "Bkg") else {}  # the others, mended, would find it
    assert {name: count for name, count in errors.counts.items() if count} == {kind: 1, **missed}
    assert errors.AP50 < 0.7
    if kind in ("Cls", "Loc"):
        assert errors.dAP[kind] > 0.3


def test_tide_tells_duplicates_and_misses(make_record, make_split):
    split = make_split([make_record(i, [OBJECT], [0]) for i in range(2)])
    twice = found((OBJECT, 0, 0.8), ([21.0, 20, 61, 60], 0, 0.7))
    errors = tide_errors(split, [twice, found()])
    assert {name: count for name, count in errors.counts.items() if count} == {"Dupe": 1, "Miss": 1}
    ap50 = errors.AP50
    assert ap50 == pytest.approx(51 / 101)
    assert {name: gain for name, gain in errors.dAP.items() if gain} == {"Miss": pytest.approx(50 / 101)}


# What tidecv 1.0.1, TIDE's own code, says of random_split(seed, 20) with the detections below: points, counts.
TIDECV = {
    7: (65.53071, (0.0, 12.97017, 0.97687, 6.93760, 7.47199, 0.0), (0, 21, 4, 57, 12, 0)),
    9: (55.72315, (0.01130, 13.61666, 4.17004, 8.31091, 9.39580, 0.0), (3, 19, 5, 34, 30, 0)),
}


@pytest.mark.parametrize("seed", TIDECV)
def test_tide_is_that_of_its_authors(seed, random_split, random_detections):
    split = random_split(seed, 20, crowds=seed == 9)
    detections = random_detections(split, seed + 1)
    rng = np.random.default_rng(0)
    for found_ones in detections:  # no ties, no empty boxes, no class without objects: there the two differ
        found_ones["scores"] = rng.random(len(found_ones["scores"]))
        found_ones["boxes"][:, 2:] = np.maximum(found_ones["boxes"][:, 2:], found_ones["boxes"][:, :2] + 1)
        known = found_ones["labels"] < 2
        found_ones.update({name: value[known] for name, value in found_ones.items()})
    errors = tide_errors(split, detections)
    ap50, gains, counts = TIDECV[seed]
    assert pytest.approx(ap50, abs=1e-4) == 100 * errors.AP50
    assert 100 * np.array(list(errors.dAP.values())) == pytest.approx(gains, abs=1e-4)
    if seed == 7:  # tidecv counts what lies on crowd, too, though its AP leaves that out
        assert tuple(errors.counts.values()) == counts
    else:
        assert all(own <= count for own, count in zip(errors.counts.values(), counts, strict=True))


def test_every_box_on_an_object_of_another_class_is_a_confusion(one_of_each):
    """Two on one cone, as MMDetection's analysis has it; COCO's Matlab code would forgive one of them."""
    detections = [dict(one) for one in PERFECT]
    detections[2] = found((OBJECT, 2, 0.8), (OBJECT, 0, 0.9), (OBJECT, 0, 0.95))
    cost = bands(error_curves(one_of_each, detections, KINDS_OF).under(name="ball"))
    assert cost == {"C75": pytest.approx(1 / 3), "Oth": pytest.approx(2 / 3)}


def test_an_empty_split_is_refused(make_split):
    for analysis in (error_curves, tide_errors):
        with pytest.raises(UserError, match="has no images to analyze"):
            analysis(make_split([]), [])


def test_supercategories_are_read_where_they_say_something(tmp_path, make_split):
    def split_with(names):
        file = tmp_path / "truth.json"
        categories = [{"id": i, "name": n, "supercategory": s} for i, (n, s) in enumerate(names.items())]
        file.write_text(json.dumps({"categories": categories}))
        return replace(make_split([]), source=file)

    assert supercategories_of(split_with(KINDS_OF)) == KINDS_OF
    assert supercategories_of(split_with(dict.fromkeys(KINDS_OF, "thing"))) is None
    assert supercategories_of(split_with({name: name for name in KINDS_OF})) is None
    assert supercategories_of(make_split([])) is None


@pytest.mark.real
def test_real_coco_boxes(shared_data, make_split):
    """pycocotools' example: C50 and C75 as its page prints them; no curve falls where an error is forgiven."""
    folder = shared_data / "evaluator" / "coco"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    split, detections = as_split(truth, results, make_split)
    groups = supercategories_of(replace(split, source=folder / "instances_val2014_100.json"))
    assert groups is not None
    assert groups["cat"] == groups["dog"] == "animal"
    under = error_curves(split, detections, groups).under()
    assert under["C50"] == pytest.approx(0.697, abs=5e-4)
    assert under["C75"] == pytest.approx(0.573, abs=5e-4)
    assert under["C50"] < under["Loc"] < under["Sim"] < under["Oth"] <= under["BG"] < under["FN"] == 1
    tide = tide_errors(split, detections)
    assert pytest.approx(under["C50"]) == tide.AP50
    # tidecv 1.0.1, its mean taken over the classes with objects; its recalls are rounded otherwise.
    assert tide.counts == {"Cls": 83, "Loc": 1, "Both": 0, "Dupe": 1, "Bkg": 0, "Miss": 97}
    gains = [100 * tide.dAP[kind] for kind in ("Cls", "Loc", "Both", "Dupe", "Bkg")]
    assert gains == pytest.approx([16.7428, 0.2474, 0.0, 0.0206, 0.0], abs=0.02)
    # Of two classes every object is missed: hotcoco counts them as 0 when these are taken away.
    assert 100 * tide.dAP["Miss"] == pytest.approx(8.22, abs=0.02)


@pytest.mark.real
def test_confusions_planted_in_real_boxes(shared_data, make_split):
    """Cats and dogs are called each other, and cats are called chairs: what AP50 loses is Sim, and is Oth."""
    folder = shared_data / "evaluator" / "coco"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    split, perfect = as_split(truth, perfect_results(truth), make_split)
    groups = supercategories_of(replace(split, source=folder / "instances_val2014_100.json"))
    for other, kind in (("dog", "Sim"), ("chair", "Oth")):
        wrong = {split.classes.index("cat"): split.classes.index(other)}
        detections = [
            {
                "boxes": np.concatenate([one["boxes"], one["boxes"]]),
                "labels": np.concatenate([one["labels"], [wrong.get(q, q) for q in one["labels"]]]).astype(int),
                "scores": np.concatenate(
                    [one["scores"], one["scores"] + [0.1 * (q in wrong) for q in one["labels"]]]
                ),
            }
            for one in perfect
        ]
        cost = bands(error_curves(split, detections, groups).under(name=other))
        assert cost.pop("C75").expected < 0.95
        assert max(cost, key=lambda name: cost[name].expected) == kind


def perfect_results(truth):
    return [
        {"image_id": row["image_id"], "category_id": row["category_id"], "bbox": row["bbox"], "score": 0.8}
        for row in truth["annotations"]
        if not row["iscrowd"]
    ]


def as_split(truth, results, make_split):
    categories = sorted(truth["categories"], key=lambda row: row["id"])
    label = {row["id"]: i for i, row in enumerate(categories)}
    records, detections = [], []
    for image in truth["images"]:
        rows = [row for row in truth["annotations"] if row["image_id"] == image["id"]]
        own = [row for row in results if row["image_id"] == image["id"]]
        boxes_K4 = np.array([row["bbox"] for row in rows], dtype=np.float32).reshape(-1, 4)
        boxes_K4[:, 2:] += boxes_K4[:, :2]
        records.append(
            Record(
                image["id"], Path(image["file_name"]), image["height"], image["width"], boxes_K4,
                np.array([label[row["category_id"]] for row in rows], dtype=np.int64),
                np.array([row["iscrowd"] for row in rows], dtype=bool),
                np.array([row["area"] for row in rows], dtype=np.float32),
            )
        )  # fmt: skip
        boxes = np.array([row["bbox"] for row in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        detections.append({
            "boxes": boxes,
            "labels": np.array([label[row["category_id"]] for row in own], dtype=int),
            "scores": np.array([row["score"] for row in own]),
        })  # fmt: skip
    return make_split(records, tuple(row["name"] for row in categories)), detections
