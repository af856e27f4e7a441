"""ATSS against the steps of its paper, one object and one anchor after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.models.layers.assignment import atss_assign
from detdistill.models.layers.heads import UNMATCHED


def random_boxes(count, low, high, seed):
    generator = np.random.default_rng(seed)
    corner = generator.uniform(0, 70, (count, 2))
    return np.concatenate([corner, corner + generator.uniform(low, high, (count, 2))], axis=1)


def iou(a, b):
    sides = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]))
    return sides.prod() / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - sides.prod())


def center(box):
    return (box[:2] + box[2:]) / 2


def by_hand(boxes, levels, topk):
    anchors = np.concatenate(levels)
    best, owner = np.full(len(anchors), -1.0), np.full(len(anchors), UNMATCHED)
    for k, box in enumerate(boxes):
        candidates, start = [], 0
        for level in levels:
            far = [np.linalg.norm(center(anchor) - center(box)) for anchor in level]
            candidates += [start + i for i in np.argsort(far)[:topk]]
            start += len(level)
        ious = [iou(box, anchors[i]) for i in candidates]
        threshold = np.mean(ious) + (np.std(ious, ddof=1) if len(ious) > 1 else 0)
        for i, value in zip(candidates, ious, strict=True):
            x, y = center(anchors[i])
            depth = min(x - box[0], y - box[1], box[2] - x, box[3] - y)
            if value >= threshold and depth > 0.01 and value > best[i]:
                best[i], owner[i] = value, k
    return owner


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("topk", [1, 4, 9])
def test_as_by_hand(seed, topk):
    levels = [random_boxes(40, 8, 20, seed), random_boxes(12, 20, 50, seed + 10), random_boxes(1, 40, 60, seed)]
    boxes = random_boxes(6, 10, 60, seed + 20)
    wanted = by_hand(boxes, levels, topk)
    got = atss_assign(torch.tensor(boxes), [torch.tensor(level) for level in levels], topk)
    assert got.tolist() == wanted.tolist()
    assert len(set(wanted)) > 2  # several objects have anchors


def test_an_anchor_of_two_objects_answers_for_the_nearer():
    far = [[40.0 + 20 * i, 40, 50 + 20 * i, 50] for i in range(5)]
    anchors = [torch.tensor([[0.0, 0, 10, 10], *far])]
    boxes = torch.tensor([[0.0, 0, 14, 14], [0, 0, 11, 11]])
    assert atss_assign(boxes[:1], anchors).tolist() == [0] + [UNMATCHED] * 5
    assert atss_assign(boxes, anchors).tolist() == [1] + [UNMATCHED] * 5


def test_no_object_and_one_anchor():
    anchor = torch.tensor([[0.0, 0, 10, 10]])
    assert atss_assign(torch.zeros(0, 4), [anchor]).tolist() == [UNMATCHED]
    assert atss_assign(torch.tensor([[0.0, 0, 9, 9]]), [anchor]).tolist() == [0]
