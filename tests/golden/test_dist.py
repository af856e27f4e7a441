"""DIST against its formula in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from detdistill.distillation.methods.dist import DISTLoss

from .differences import assert_golden, random_maps

EPS = 1e-8


def scores(logits, kind, tau):
    if kind == "sigmoid":
        return 1 / (1 + np.exp(-logits / tau))
    weights = np.exp(logits / tau)
    return weights / weights.sum(axis=1, keepdims=True)


def pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return np.sum(a * b) / (np.sqrt(np.sum(a**2)) * np.sqrt(np.sum(b**2)) + EPS)


def dist(student, teacher, kind, beta, gamma, tau):
    """student, teacher: rows of class logits."""
    s, t = scores(student, kind, tau), scores(teacher, kind, tau)
    inter = 1 - np.mean([pearson(s[row], t[row]) for row in range(len(s))])
    intra = 1 - np.mean([pearson(s[:, k], t[:, k]) for k in range(s.shape[1])])
    return tau**2 * (beta * inter + gamma * intra)


def rows_of(maps):
    """(N, K, H, W) as (N·H·W, K)."""
    return maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1])


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("beta", "gamma", "tau"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0)])
def test_maps(kind, beta, gamma, tau):
    loss = DISTLoss(inter_weight=beta, intra_weight=gamma, temperature=tau, scores=kind)
    student, teacher = random_maps((2, 5, 3, 4))
    assert_golden(loss, lambda s, t: dist(rows_of(s), rows_of(t), kind, beta, gamma, tau), student, teacher)


def test_regions():
    student, teacher = random_maps((7, 4))
    assert_golden(DISTLoss(scores="softmax"), lambda s, t: dist(s, t, "softmax", 1, 1, 1), student, teacher)
