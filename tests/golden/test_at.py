"""AT against its formula in plain numpy."""

from __future__ import annotations

import numpy as np

from detdistill.distillation.methods.at import ATLoss

from .differences import assert_golden, random_maps


def attention(feature):
    """normalize_L2(vec(mean_c F²)) of one image."""
    energy = np.mean(feature**2, axis=0).ravel()
    return energy / np.sqrt(np.sum(energy**2))


def at(student, teacher, alpha=10000.0):
    rows = [(attention(s) - attention(t)) ** 2 for s, t in zip(student, teacher, strict=True)]
    return alpha * np.mean(rows)


def test_value_and_gradient():
    assert_golden(ATLoss(), at, *random_maps((3, 4, 5, 6)))


def test_channels_may_differ():
    assert_golden(ATLoss(), at, *random_maps((2, 3, 4, 4), teacher_shape=(2, 7, 4, 4)))
