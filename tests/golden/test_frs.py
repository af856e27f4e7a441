"""FRS against its formulas in plain numpy."""

from __future__ import annotations

import numpy as np

from detdistill.distillation.methods.frs import FRSLoss, richness

from .differences import assert_golden, random_maps

LOGITS = np.random.default_rng(2).normal(-1, 2, (2, 6, 4, 5))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mask(logits):
    """m = max_c sigmoid(cls_T) for each location."""
    return sigmoid(logits).max(axis=1)


def features(student, teacher, logits, w_f=0.005):
    m = mask(logits)
    total = 0.0
    for n, c, i, j in np.ndindex(student.shape):
        total += m[n, i, j] * (student[n, c, i, j] - teacher[n, c, i, j]) ** 2
    return w_f * total / m.sum()


def scores(student, teacher, w_c=0.02):
    m = mask(teacher)
    total = 0.0
    for n, q, i, j in np.ndindex(student.shape):
        p, t = sigmoid(student[n, q, i, j]), sigmoid(teacher[n, q, i, j])
        total += m[n, i, j] * (-t * np.log(p) - (1 - t) * np.log(1 - p))
    return w_c * total / m.sum()


def test_value_and_gradient_of_the_features():
    loss = FRSLoss()
    assert_golden(lambda s, t, z: loss(s, t, richness(z)), features, *random_maps((2, 3, 4, 5)), LOGITS)


def test_value_and_gradient_of_the_scores():
    loss = FRSLoss(cls_weight=0.1)
    assert_golden(
        lambda s, t: loss.scores(s, t, richness(t)),
        lambda s, t: scores(s, t, 0.1),
        np.random.default_rng(3).normal(0, 2, LOGITS.shape),
        LOGITS,
    )
