"""CrossKD against its formulas in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.crosskd import CrossKDLoss, ScaleAlign, box_distance

from .differences import assert_golden

N, P, Q, BINS = 2, 6, 3, 5
COUNT = np.array(3.0)
VALID = np.array([[1.0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def random_inputs():
    """Class logits and boxes of both; the boxes are near each other, and some do not meet."""
    generator = np.random.default_rng(3)
    student, teacher = (generator.normal(0, 2, (N, P, Q)) for _ in range(2))
    corners = generator.uniform(0, 100, (N, P, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(30, 90, (N, P, 2))], axis=2)
    moved = boxes + generator.uniform(-12, 12, boxes.shape)
    moved[0, 0] += 200
    return student, teacher, boxes, moved


def classes(student, teacher, beta=1.0):
    """Σ BCE(p̂, σ(p)) · |σ(p̂) - σ(p)|^beta / n."""
    total = 0.0
    for n, p, q in np.ndindex(N, P, Q):
        guess, truth = sigmoid(student[n, p, q]), sigmoid(teacher[n, p, q])
        bce = -truth * np.log(guess) - (1 - truth) * np.log(1 - guess)
        total += VALID[n, p] * bce * abs(guess - truth) ** beta
    return total / COUNT


def weights(teacher):
    return np.array([[VALID[n, p] * sigmoid(teacher[n, p]).max() for p in range(P)] for n in range(N)])


def overlap_and_union(a, b):
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height, area_a + area_b - width * height


def giou_distance(a, b):
    overlap, union = overlap_and_union(a, b)
    width, height = (max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1))
    return 1 - (overlap / union - (width * height - union) / (width * height))


def iou_distance(a, b):
    overlap, union = overlap_and_union(a, b)
    return -np.log(max(overlap / union, 1e-6))


def boxes_term(student, teacher, cls, distance):
    w = weights(cls)
    return sum(w[n, p] * distance(student[n, p], teacher[n, p]) for n, p in np.ndindex(N, P)) / COUNT


@pytest.mark.parametrize(("kind", "expected"), [("giou", 1.0), ("iou", -np.log(1e-6))])
def test_boxes_without_area(kind, expected):
    """The published code clamps IoU at 1e-6, and areas at 1e-7 for GIoU."""
    boxes = torch.tensor([[0.0, 0, 0, 0], [5, 5, 5, 9]], dtype=torch.float64, requires_grad=True)
    distance = box_distance(boxes, boxes.detach(), kind)
    np.testing.assert_allclose(distance.detach(), expected, rtol=1e-12)
    distance.sum().backward()
    assert not boxes.grad.any()


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_classes(beta):
    student, teacher, boxes, moved = random_inputs()
    loss = CrossKDLoss(cls_weight=0.4, box_weight=0.75, beta=beta)

    def formula(student, teacher, boxes, moved, count, valid):
        return 0.4 * classes(student, teacher, beta) + 0.75 * boxes_term(boxes, moved, teacher, giou_distance)

    assert_golden(loss, formula, student, teacher, boxes, moved, COUNT, VALID, coordinates=36)


@pytest.mark.parametrize(("kind", "distance"), [("giou", giou_distance), ("iou", iou_distance)])
def test_boxes(kind, distance):
    student, teacher, boxes, moved = random_inputs()
    crosskd = CrossKDLoss(box_weight=2.0, box_loss=kind)

    def loss(boxes, moved, student, teacher, count, valid):
        return crosskd(student, teacher, boxes, moved, count, valid)

    def formula(boxes, moved, student, teacher, count, valid):
        return classes(student, teacher) + 2 * boxes_term(boxes, moved, teacher, distance)

    assert_golden(loss, formula, boxes, moved, student, teacher, COUNT, VALID, coordinates=48)


def test_distributions():
    student, teacher, *_ = random_inputs()
    generator = np.random.default_rng(4)
    sides, wanted = (generator.normal(0, 2, (N, P, 4, BINS)) for _ in range(2))
    crosskd = CrossKDLoss(box_weight=4.0, temperature=2.0)

    def loss(sides, wanted, student, teacher, count, valid):
        return crosskd(student, teacher, sides, wanted, count, valid)

    def formula(sides, wanted, student, teacher, count, valid):
        w, total = weights(teacher), 0.0
        for n, p, side in np.ndindex(N, P, 4):
            s, t = softmax(sides[n, p, side] / 2), softmax(wanted[n, p, side] / 2)
            total += w[n, p] * 2**2 * np.sum(t * np.log(t / s))
        return classes(student, teacher) + 4 * total / (4 * w.sum())

    assert_golden(loss, formula, sides, wanted, student, teacher, COUNT, VALID)


@pytest.mark.parametrize("std", [3.0, 1e-2])
def test_scale_alignment(std):
    """Also of small features, where an eps of 1e-6 on the variance in place of the deviation would show."""
    generator = np.random.default_rng(5)
    student, teacher, probe = (
        generator.normal(mean, std, (2, 3, 4, 4)) for mean, std in ((1, std), (-2, 0.5), (0, 1))
    )
    align = ScaleAlign()

    def loss(student, teacher, probe):
        return (align(student, teacher) * probe).sum()

    def formula(student, teacher, probe):
        total = 0.0
        for c in range(3):
            s, t = student[:, c], teacher[:, c]
            aligned = (s - s.mean()) / (s.std(ddof=1) + 1e-6) * t.std(ddof=1) + t.mean()
            total += np.sum(aligned * probe[:, c])
        return total

    assert_golden(loss, formula, student, teacher, probe, coordinates=30)
