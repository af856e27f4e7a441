"""LD against its formulas in plain numpy."""

from __future__ import annotations

import numpy as np
import torch

from detdistill.distillation.methods.ld import LDLoss

from .differences import assert_golden

N, P, BINS, Q = 2, 5, 6, 4
POSITIVE = np.array([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
REGION = np.array([[0.2, 0.0, 0.6, 0.5, 0.0], [0.0, 0.3, 0.0, 0.0, 0.0]])


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def kd(student, teacher, temperature):
    """τ² · mean over bins of t log(t / s)."""
    s, t = softmax(student / temperature), softmax(teacher / temperature)
    return temperature**2 * np.mean(t * np.log(t / s))


def ld(box, box_teacher, cls, cls_teacher, score):
    """``score``: the student's best class score; no gradient flows through it."""
    main = vlr = classes = 0.0
    for n, p in np.ndindex(N, P):
        edges = sum(kd(box[n, p, side], box_teacher[n, p, side], 10) for side in range(4))
        main += POSITIVE[n, p] * score[n, p] * edges / 4
        vlr += REGION[n, p] * edges / 16
        classes += POSITIVE[n, p] * kd(cls[n, p], cls_teacher[n, p], 2)
    return 0.25 * main + 0.25 * vlr + 10 * classes / POSITIVE.sum()


def test_value_and_gradient():
    generator = np.random.default_rng(7)
    box, box_teacher = (generator.normal(0, 4, (N, P, 4, BINS)) for _ in range(2))
    cls, cls_teacher = (generator.normal(0, 2, (N, P, Q)) for _ in range(2))
    score = (1 / (1 + np.exp(-cls))).max(axis=2)
    rest = (box_teacher, cls_teacher, POSITIVE, REGION)

    def formula_of_box(box, cls, box_teacher, cls_teacher, positive, region):
        return ld(box, box_teacher, cls, cls_teacher, score)

    def loss_of_box(box, cls, box_teacher, cls_teacher, positive, region):
        return LDLoss()(box, box_teacher, cls, cls_teacher, positive, region)

    assert_golden(loss_of_box, formula_of_box, box, cls, *rest, coordinates=40)
    assert_golden(
        lambda cls, box, *rest: loss_of_box(box, cls, *rest),
        lambda cls, box, *rest: formula_of_box(box, cls, *rest),
        cls, box, *rest, coordinates=40,
    )  # fmt: skip


def test_more_images_of_the_same_kind_change_nothing():
    """The published sums over the batch would be three times as large."""
    generator = torch.Generator().manual_seed(0)
    box, box_teacher = torch.randn(2, N, P, 4, BINS, generator=generator)
    cls, cls_teacher = torch.randn(2, N, P, Q, generator=generator)
    tensors = [box, box_teacher, cls, cls_teacher, torch.tensor(POSITIVE) > 0, torch.tensor(REGION).float()]
    once = LDLoss()(*tensors)
    thrice = LDLoss()(*(x.repeat(3, *[1] * (x.ndim - 1)) for x in tensors))
    torch.testing.assert_close(once, thrice)
    assert once > 0
