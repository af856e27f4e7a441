"""KD against its formulas in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.kd import KDLoss

from .differences import assert_golden

N, P, Q, R = 2, 5, 3, 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def dense(student, teacher, student_box, teacher_box, cls_weight, box_weight, tau):
    cls = box = seen = 0.0
    for n, p in np.ndindex(N, P):
        weight = sigmoid(teacher[n, p]).max()
        seen += weight
        for q in range(Q):
            want, have = sigmoid(teacher[n, p, q] / tau), sigmoid(student[n, p, q] / tau)
            cls += weight * (want * np.log(want / have) + (1 - want) * np.log((1 - want) / (1 - have)))
        box += weight * np.abs(student_box[n, p] - teacher_box[n, p]).sum()
    return (cls_weight * tau**2 * cls + box_weight * box) / max(1.0, seen)


def regions(student, teacher, student_box, teacher_box, cls_weight, box_weight, tau):
    cls = box = seen = 0.0
    for r in range(len(student)):
        want, have = softmax(teacher[r] / tau), softmax(student[r] / tau)
        cls += np.sum(want * np.log(want / have)) / len(student)
        share = softmax(teacher[r])
        for q in range(1, Q + 1):
            seen += share[q]
            sides = slice(4 * q, 4 * q + 4)
            box += share[q] * np.abs(student_box[r, sides] - teacher_box[r, sides]).sum()
    return cls_weight * tau**2 * cls + box_weight * box / max(1.0, seen)


def arrays(*shapes, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(-0.5, 1.5, shape) for shape in shapes]


OPTIONS = [(1.0, 1.0, 1.0), (0.7, 0.0, 2.0), (0.0, 0.3, 1.0)]


@pytest.mark.parametrize(("cls_weight", "box_weight", "tau"), OPTIONS)
def test_one_stage(cls_weight, box_weight, tau):
    loss = KDLoss(cls_weight=cls_weight, box_weight=box_weight, temperature=tau)
    student, teacher, student_box, teacher_box = arrays((N, P, Q), (N, P, Q), (N, P, 4), (N, P, 4))
    options = (cls_weight, box_weight, tau)
    if cls_weight:
        assert_golden(
            loss, lambda *a: dense(*a, *options), student, teacher, student_box, teacher_box, coordinates=30
        )
    if box_weight:
        assert_golden(
            lambda box, s, t, other: loss(s, t, box, other),
            lambda box, s, t, other: dense(s, t, box, other, *options),
            student_box, student, teacher, teacher_box,
        )  # fmt: skip


@pytest.mark.parametrize(("cls_weight", "box_weight", "tau"), OPTIONS)
def test_two_stage(cls_weight, box_weight, tau):
    loss = KDLoss(cls_weight=cls_weight, box_weight=box_weight, temperature=tau)
    shapes = ((R, Q + 1), (R, Q + 1), (R, 4 * (Q + 1)), (R, 4 * (Q + 1)))
    student, teacher, student_box, teacher_box = arrays(*shapes, seed=1)
    options = (cls_weight, box_weight, tau)
    if cls_weight:
        assert_golden(
            loss.regions, lambda *a: regions(*a, *options), student, teacher, student_box, teacher_box,
            coordinates=24,
        )  # fmt: skip
    if box_weight:
        assert_golden(
            lambda box, s, t, other: loss.regions(s, t, box, other),
            lambda box, s, t, other: regions(s, t, box, other, *options),
            student_box, student, teacher, teacher_box, coordinates=24,
        )  # fmt: skip


def test_where_the_teacher_sees_nothing_the_count_is_one():
    student, teacher, student_box, teacher_box = arrays((N, P, Q), (N, P, Q), (N, P, 4), (N, P, 4))
    assert_golden(KDLoss(), lambda *a: dense(*a, 1.0, 1.0, 1.0), student, teacher - 8, student_box, teacher_box)
    shapes = ((R, Q + 1), (R, Q + 1), (R, 4 * (Q + 1)), (R, 4 * (Q + 1)))
    student, teacher, student_box, teacher_box = arrays(*shapes)
    teacher[:, 0] += 9
    constants = (teacher, student_box, teacher_box)
    assert_golden(KDLoss().regions, lambda *a: regions(*a, 1.0, 1.0, 1.0), student, *constants)


def test_far_logits_do_not_overflow():
    student = torch.tensor([[[200.0, -200.0, 0.0]]], requires_grad=True)
    value = KDLoss()(student, torch.tensor([[[-200.0, 200.0, 0.0]]]))
    value.backward()
    assert value.item() == pytest.approx(400.0)
    assert student.grad.isfinite().all()


def test_no_regions_count_nothing():
    logits = torch.zeros(0, Q + 1, requires_grad=True)
    deltas = torch.zeros(0, 4 * (Q + 1), requires_grad=True)
    value = KDLoss().regions(logits, logits.detach(), deltas, deltas.detach())
    value.backward()
    assert value.item() == 0


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_pixels(tau):
    valid = np.ones((2, 4, 5), bool)
    valid[1, :, 3:] = False

    def formula(student, teacher):
        kl = []
        for n, y, x in np.argwhere(valid):
            want, have = softmax(teacher[n, :, y, x] / tau), softmax(student[n, :, y, x] / tau)
            kl.append(np.sum(want * np.log(want / have)))
        return 2.0 * tau**2 * np.mean(kl)

    student, teacher = arrays((2, 3, 4, 5), (2, 3, 4, 5))
    loss = KDLoss(cls_weight=2.0, temperature=tau)
    assert_golden(lambda s, t: loss.pixels(s, t, torch.tensor(valid)), formula, student, teacher)
