"""VOC AP against known numbers, scikit-learn and cases small enough to count by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from detdistill.errors import UserError
from detdistill.evaluation.voc import voc_ap

REFERENCE = [  # IoU, area, 11 points: the README of the evaluator data
    (0.1, 0.3371980676, 0.3333333333),
    (0.3, 0.2456866804, 0.2683982683),
    (0.5, 0.0222222222, 0.0303030303),
    (0.75, 0.0, 0.0),
]


def rows(path: Path) -> np.ndarray:
    return np.array([line.split()[1:] for line in path.read_text().splitlines()], dtype=float)


def corners(boxes: np.ndarray) -> np.ndarray:
    """left, top, width, height to inclusive pixel indices of the corners."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


@pytest.mark.real
@pytest.mark.parametrize(("iou", "area", "eleven"), REFERENCE)
def test_reference(iou, area, eleven, shared_data, make_record, make_split):
    folder = shared_data / "evaluator" / "voc"
    records, found = [], []
    for path in sorted((folder / "gts").glob("*.txt")):
        boxes = corners(rows(path))
        records.append(make_record(path.stem, boxes, [0] * len(boxes)))
        detections = rows(folder / "dets" / path.name)
        labels = np.zeros(len(detections), int)
        found.append({"boxes": corners(detections[:, 1:]), "labels": labels, "scores": detections[:, 0]})
    split = make_split(records, ("object",))
    assert voc_ap(split, found, iou, "area", pixel_offset=True).mAP == pytest.approx(area, abs=1e-9)
    assert voc_ap(split, found, iou, "11point", pixel_offset=True).mAP == pytest.approx(eleven, abs=1e-9)


def one_image(make_record, make_split, truth, found, scores, ignore=None):
    split = make_split([make_record(1, truth, [0] * len(truth), ignore)], ("object", "other"))
    return split, [
        {"boxes": np.array(found, float), "labels": np.zeros(len(found), int), "scores": np.array(scores)}
    ]


A, B, FAR = [10, 10, 50, 50], [100, 100, 160, 160], [200, 10, 240, 50]


def test_difficult_is_neither_hit_nor_miss(make_record, make_split):
    case = one_image(make_record, make_split, [A, B], [B, B, A], [0.9, 0.8, 0.7], ignore=[False, True])
    assert voc_ap(*case).mAP == 1
    case = one_image(make_record, make_split, [A, B], [A], [0.7], ignore=[False, True])
    assert voc_ap(*case).mAP == 1
    case = one_image(make_record, make_split, [A, B], [B, B, A], [0.9, 0.8, 0.7])
    # hits at ranks 1 and 3 of two objects: 1/2 · 1 + 1/2 · 2/3
    assert voc_ap(*case).mAP == pytest.approx(5 / 6)


def test_second_detection_of_an_object_is_a_false_alarm(make_record, make_split):
    case = one_image(make_record, make_split, [A, B], [A, A, B], [0.9, 0.8, 0.7])
    assert voc_ap(*case).mAP == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    # Six of the 11 recalls (0 to 0.5) at precision 1, five at 2/3.
    assert voc_ap(*case, metric="11point").mAP == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_each_detection_takes_what_it_overlaps_most(make_record, make_split):
    """The devkit's rule: a second detection does not fall back to the next best object."""
    near = [12, 10, 52, 50]  # IoU 0.9 with A
    case = one_image(make_record, make_split, [A, near], [A, A], [0.9, 0.8])
    assert voc_ap(*case).mAP == pytest.approx(0.5)


def test_area_is_scikit_learns_where_precision_falls(make_record, make_split):
    """With precision that only falls, the envelope changes nothing: average_precision_score is an oracle."""
    from sklearn.metrics import average_precision_score

    hits = np.array([1, 1, 1, 0, 1, 0, 0, 0, 1, 0])
    truth = [[20 * i, 0, 20 * i + 10, 10] for i in range(int(hits.sum()))]
    boxes, k = [], 0
    for hit in hits:
        boxes.append(truth[k] if hit else [*FAR[:2], 250, 190])
        k += int(hit)
    scores = np.linspace(0.9, 0.1, len(hits))
    case = one_image(make_record, make_split, truth, boxes, scores)
    assert voc_ap(*case).mAP == pytest.approx(average_precision_score(hits, scores))


def test_pixel_offset_changes_iou(make_record, make_split):
    # 10 of 20 pixels shared: IoU 0.5 as lengths; 11 of 21 with inclusive corners.
    case = one_image(make_record, make_split, [[0, 0, 20, 20]], [[0, 0, 10, 20]], [0.9])
    assert voc_ap(*case, iou=0.52).mAP == 0
    assert voc_ap(*case, iou=0.52, pixel_offset=True).mAP == 1


def test_undefined_and_errors(make_record, make_split):
    split, found = one_image(make_record, make_split, [A], [], [])
    result = voc_ap(split, [{"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}])
    assert result.mAP == 0
    assert math.isnan(result.per_class["other"])
    split, found = one_image(make_record, make_split, [], [A], [0.9])
    assert math.isnan(voc_ap(split, found).mAP)
    with pytest.raises(UserError, match="no images"):
        voc_ap(make_split([]), [])
    split, found = one_image(make_record, make_split, [A], [A, [math.nan, 0, 1, 1]], [0.5, 0.9])
    with pytest.warns(UserWarning, match="1 detections"):
        assert voc_ap(split, found).mAP == 1
