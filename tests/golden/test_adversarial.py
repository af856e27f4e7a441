"""The adversarial term against its formulas in plain numpy, with a discriminator whose slopes are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from detdistill.distillation.methods.adversarial import AdversarialLoss

from .differences import assert_golden, random_maps

SHAPE = (3, 2, 4, 5)
GENERATOR = np.random.default_rng(4)
WEIGHTS = GENERATOR.normal(0, 0.3, SHAPE[1:])
MIX = np.array([0.2, 0.9, 0.5])
OPTIONS = {"alpha": 0.7, "discriminator_weight": 0.3}


class Quadratic(nn.Module):
    """D(x) = Σ w x + 0.1 Σ w² x² of each image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(WEIGHTS))

    def forward(self, x):
        w = self.weight.to(x.dtype)
        return (w * x + 0.1 * w**2 * x**2).sum(dim=(1, 2, 3), keepdim=True)


def scores(x, w):
    return (w * x + 0.1 * w**2 * x**2).sum(axis=(1, 2, 3))


def of_the_discriminator(w, student, teacher, kind, penalty):
    of_s, of_t = scores(student, w), scores(teacher, w)
    if kind == "hinge":
        return np.maximum(0, 1 + of_s).mean() + np.maximum(0, 1 - of_t).mean()
    mix = MIX[:, None, None, None]
    mixed = mix * teacher + (1 - mix) * student
    slopes = w + 0.2 * w**2 * mixed
    lengths = np.sqrt((slopes**2).sum(axis=(1, 2, 3)))
    return of_s.mean() - of_t.mean() + penalty * ((lengths - 1) ** 2).mean()


@pytest.mark.parametrize("kind", ["wgan-gp", "hinge"])
def test_the_students_loss(kind):
    """Its value is the student's alone, and so is its gradient by the student's logits."""
    loss = AdversarialLoss(**OPTIONS, kind=kind)
    student, teacher = random_maps(SHAPE)
    assert_golden(
        lambda s, t: loss(s, t, torch.tensor(MIX, dtype=s.dtype), Quadratic()),
        lambda s, t: -0.7 * scores(s, WEIGHTS).mean(),
        student,
        teacher,
    )


@pytest.mark.parametrize(("kind", "penalty"), [("wgan-gp", 10.0), ("wgan-gp", 0.0), ("hinge", 10.0)])
def test_the_discriminators_gradient(kind, penalty):
    student, teacher = random_maps(SHAPE)
    discriminator = Quadratic()
    loss = AdversarialLoss(**OPTIONS, kind=kind, gradient_penalty=penalty)
    loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(MIX), discriminator).backward()
    gradient = discriminator.weight.grad.numpy()
    for place in [(0, 0, 0), (1, 3, 4), (0, 2, 1)]:
        values = []
        for step in (1e-5, -1e-5):
            moved = WEIGHTS.copy()
            moved[place] += step
            values.append(0.3 * of_the_discriminator(moved, student, teacher, kind, penalty))
        slope = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(gradient[place], slope, rtol=1e-6, atol=1e-9)
