"""SKD against its formula in plain numpy: SSIM window by window."""

from __future__ import annotations

import numpy as np
import pytest

from detdistill.distillation.methods.skd import SKDLoss

from .differences import assert_golden, random_maps

C1, C2 = 0.01**2, 0.03**2


def gaussian(size):
    weights = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * 1.5**2))
    return weights / weights.sum()


def largest_window(side):
    return max(size for size in range(1, 12, 2) if size <= side)


def mirrored(i, side):
    """The cell that a mirror at the border's cell shows in place of cell i."""
    i = abs(i)
    return 2 * (side - 1) - i if i >= side else i


def windows(channel, rows, columns):
    """The window around every cell, mirrored at the border."""
    height, width = channel.shape
    for i in range(height):
        for j in range(width):
            at_y = [mirrored(i + d, height) for d in range(-(rows // 2), rows // 2 + 1)]
            at_x = [mirrored(j + d, width) for d in range(-(columns // 2), columns // 2 + 1)]
            yield channel[np.ix_(at_y, at_x)]


def ssim(x, y):
    """Mean over the cells of one channel."""
    rows, columns = largest_window(x.shape[0]), largest_window(x.shape[1])
    weight = np.outer(gaussian(rows), gaussian(columns))
    values = []
    for a, b in zip(windows(x, rows, columns), windows(y, rows, columns), strict=True):
        mean_a, mean_b = np.sum(weight * a), np.sum(weight * b)
        var_a, var_b = np.sum(weight * (a - mean_a) ** 2), np.sum(weight * (b - mean_b) ** 2)
        cov = np.sum(weight * (a - mean_a) * (b - mean_b))
        values.append(
            (2 * mean_a * mean_b + C1) * (2 * cov + C2) / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))
        )
    return np.mean(values)


def skd(student, teacher, alpha=4.0):
    x, y = ((f - f.min()) / (f.max() - f.min() + 1e-6) for f in (student, teacher))
    n, c = x.shape[:2]
    return alpha * np.mean([(1 - ssim(x[i, k], y[i, k])) / 2 for i in range(n) for k in range(c)])


@pytest.mark.parametrize("shape", [(1, 2, 12, 13), (2, 2, 4, 7), (2, 3, 1, 2)])
def test_value_and_gradient(shape):
    student, teacher = random_maps(shape)
    extremes = (student.argmin(), student.argmax())  # they move the range
    assert_golden(SKDLoss(), skd, student, teacher, coordinates=5, also=extremes)
