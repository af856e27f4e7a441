"""PKD against its formula in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.pkd import PKDLoss

from .differences import assert_golden, random_maps


def standardized(feature):
    """(x - mean) / (std + 1e-6) for each channel over N·H·W, std unbiased."""
    result = np.empty_like(feature)
    for c in range(feature.shape[1]):
        x = feature[:, c]
        result[:, c] = (x - x.mean()) / (x.std(ddof=1) + 1e-6)
    return result


def pkd(student, teacher, alpha=10.0):
    return alpha * np.mean((standardized(student) - standardized(teacher)) ** 2) / 2


def test_value_and_gradient():
    assert_golden(PKDLoss(), pkd, *random_maps((3, 4, 5, 6)))


def test_the_epsilon_of_the_std():
    # at a std of 1e-5 the added 1e-6 weighs a tenth
    student, teacher = (x * np.array([1e-5, 1.0])[:, None, None] for x in random_maps((2, 2, 4, 4)))
    value = PKDLoss()(torch.from_numpy(student), torch.from_numpy(teacher)).item()
    assert value == pytest.approx(pkd(student, teacher), rel=1e-9)


def test_it_is_one_minus_the_correlation():
    student, teacher = random_maps((2, 1, 6, 6))
    n = student.size
    r = np.corrcoef(student.ravel(), teacher.ravel())[0, 1]
    value = PKDLoss(alpha=1.0)(torch.from_numpy(student), torch.from_numpy(teacher)).item()
    assert value == pytest.approx((1 - r) * (n - 1) / n, rel=1e-4)
