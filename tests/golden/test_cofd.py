"""COFD against its formulas in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from detdistill.distillation.methods.cofd import COFDLoss, batch_norm_margin
from detdistill.recipe.methods import COFDOptions

from .differences import assert_golden, random_maps

MARGIN = np.array([-0.9, -0.3, 0.0, -0.5])


def cofd(student, teacher, margin, alpha=1e-4):
    total = 0.0
    for index in np.ndindex(student.shape):
        s, t = student[index], max(teacher[index], margin[index[1]])
        if s > t or t > 0:
            total += (s - t) ** 2
    return alpha * total / student.shape[0]


def test_value_and_gradient():
    student, teacher = random_maps((3, 4, 5, 6))
    below = (student <= np.maximum(teacher, MARGIN[:, None, None])) & (teacher <= 0)
    assert 0.05 < below.mean() < 0.95  # both branches are tried
    assert_golden(COFDLoss(), cofd, student, teacher, MARGIN, coordinates=20, also=np.flatnonzero(below)[:3])


def test_the_map_before_a_segmenters_classifier():
    """The published divider of that map is 16, and its weight 1e-5."""
    student, teacher = random_maps((3, 4, 5, 6))
    loss = COFDLoss(**COFDOptions.presets["segmentation"])
    assert_golden(loss, lambda s, t, m: cofd(s, t, m, 1e-5) / 16, student, teacher, MARGIN)


@pytest.mark.parametrize(("weight", "bias"), [(1.0, 0.0), (0.5, 0.7), (-2.0, -1.0), (1.0, 3.0), (0.1, -5.0)])
def test_margin_is_the_mean_of_what_is_negative(weight, bias):
    density = stats.norm(bias, abs(weight))
    low = bias - 12 * abs(weight)
    mass, _ = integrate.quad(density.pdf, low, min(0.0, bias + 12 * abs(weight)))
    moment, _ = integrate.quad(lambda x: x * density.pdf(x), low, min(0.0, bias + 12 * abs(weight)))
    margin = batch_norm_margin(torch.tensor([weight]).double(), torch.tensor([bias]).double())
    assert margin.item() == pytest.approx(moment / mass, rel=1e-7)


def test_margin_of_a_channel_that_is_hardly_ever_negative():
    margin = batch_norm_margin(torch.tensor([0.5, -0.5]), torch.tensor([2.0, 2.0]))  # 4 deviations above 0
    assert margin.tolist() == [-1.5, -1.5]


def test_margin_of_a_silent_channel():
    margin = batch_norm_margin(torch.zeros(3), torch.tensor([-2.0, 0.0, 2.0]))
    torch.testing.assert_close(margin, torch.tensor([-2.0, 0.0, 0.0]))
