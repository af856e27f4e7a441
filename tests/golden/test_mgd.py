"""MGD against its formula in plain numpy."""

from __future__ import annotations

import numpy as np
import torch

from detdistill.distillation.methods.mgd import MGDLoss, generator

from .differences import assert_golden, random_maps

GENERATOR = np.random.default_rng(2)
WEIGHTS = [GENERATOR.normal(0, 0.3, (3, 3, 3, 3)) for _ in range(2)]
BIASES = [GENERATOR.normal(0, 0.3, 3) for _ in range(2)]
MASK = GENERATOR.integers(0, 2, (2, 1, 4, 5)).astype(float)


def conv3x3(x, weight, bias):
    n, _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((n, len(weight), height, width))
    for i, j in np.ndindex(3, 3):
        out += np.einsum("nchw,oc->nohw", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
    return out + bias[:, None, None]


def mgd(student, teacher, alpha=2e-5):
    """alpha ||T - G(S M)||² / N."""
    tower_features = np.maximum(conv3x3(student * MASK, WEIGHTS[0], BIASES[0]), 0)
    generated = conv3x3(tower_features, WEIGHTS[1], BIASES[1])
    return alpha * ((teacher - generated) ** 2).sum() / len(student)


def test_value_and_gradient_through_the_generator():
    loss = MGDLoss()

    def ours(student, teacher):
        network = generator(3).to(student.dtype)
        arrays = [array for pair in zip(WEIGHTS, BIASES, strict=True) for array in pair]
        for parameter, array in zip(network.parameters(), arrays, strict=True):
            parameter.data = torch.tensor(array, dtype=student.dtype)
        return loss(network(student * torch.tensor(MASK, dtype=student.dtype)), teacher)

    assert_golden(ours, mgd, *random_maps((2, 3, 4, 5)))
