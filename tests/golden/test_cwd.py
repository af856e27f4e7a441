"""CWD against its formula in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from detdistill.distillation.methods.cwd import CWDLoss

from .differences import assert_golden, random_maps


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def cwd(student, teacher, alpha, tau):
    n, c = student.shape[:2]
    total = 0.0
    for i in range(n):
        for k in range(c):
            p_t, p_s = softmax(teacher[i, k] / tau), softmax(student[i, k] / tau)
            total += np.sum(p_t * (np.log(p_t) - np.log(p_s)))
    return alpha * tau**2 / (n * c) * total


@pytest.mark.parametrize(("alpha", "tau"), [(10.0, 1.0), (50.0, 4.0)])
def test_value_and_gradient(alpha, tau):
    loss = CWDLoss(alpha=alpha, tau=tau)
    assert_golden(loss, lambda s, t: cwd(s, t, alpha, tau), *random_maps((3, 4, 5, 6)))
