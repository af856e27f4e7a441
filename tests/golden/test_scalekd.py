"""ScaleKD's features and attention against their formulas in plain numpy; its predictions are kd's."""

from __future__ import annotations

import numpy as np
import torch

from detdistill.distillation.methods.scalekd import CrossScaleAttention, ScaleDecoupled, ScaleKDLoss

from .differences import assert_golden, random_maps

N, C, H, W = 2, 4, 4, 5


def weights_of(conv):
    return conv.weight.detach().numpy(), 0.0 if conv.bias is None else conv.bias.detach().numpy()


def pointwise(conv, x):
    weight, bias = weights_of(conv)
    return np.einsum("oc,chw->ohw", weight[:, :, 0, 0], x) + np.reshape(bias, (-1, 1, 1))


def around(x, i, j, step):
    """The 3×3 neighbors of a cell, ``step`` cells apart; 0 outside the map."""
    patch = np.zeros((len(x), 3, 3))
    for a, b in np.ndindex(3, 3):
        row, column = i + (a - 1) * step, j + (b - 1) * step
        if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
            patch[:, a, b] = x[:, row, column]
    return patch


def decoupled(module, x):
    maps = []
    for dilation in (1, 2, 3):
        reduced = np.maximum(pointwise(module.reduce, x), 0)
        weight, bias = weights_of(module.look)
        looked = np.empty((len(weight), *x.shape[1:]))
        for i, j in np.ndindex(x.shape[1:]):
            looked[:, i, j] = np.einsum("ocab,cab->o", weight, around(reduced, i, j, dilation)) + bias
        maps.append(x + pointwise(module.expand, np.maximum(looked, 0)))
    return np.stack(maps)


def test_features():
    torch.manual_seed(0)
    module = ScaleDecoupled(C).double()
    loss = ScaleKDLoss(feature_weight=0.07)
    student, teacher = random_maps((N, C, H, W))

    def formula(s, t):
        distances = [(decoupled(module, a) - decoupled(module, b)) ** 2 for a, b in zip(s, t, strict=True)]
        return 0.07 * np.sum(distances) / (3 * N * H * W)

    def ours(s, t):
        return loss(module.to(s.dtype)(s), module(t))

    assert_golden(ours, formula, student, teacher)


def test_attention():
    torch.manual_seed(0)
    module = CrossScaleAttention(12, 3).double()  # 4 heads of 3 channels
    heads, rates = module.heads, (2, 1)
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(12, H, W)), generator.normal(size=(3, 5, 3))
    keys, values = [], []
    for rate in rates:
        height, width = -(-teacher.shape[1] // rate), -(-teacher.shape[2] // rate)
        shrunk = np.empty((3, height, width))
        for i, j in np.ndindex(height, width):
            rows = slice(i * 5 // height, -(-(i + 1) * 5 // height))
            columns = slice(j * 3 // width, -(-(j + 1) * 3 // width))
            shrunk[:, i, j] = teacher[:, rows, columns].mean(axis=(1, 2))
        value = pointwise(module.value, shrunk)
        weight, bias = weights_of(module.position)
        keys.append(pointwise(module.key, shrunk).reshape(12, -1))
        placed = [
            value[:, i, j] + np.sum(weight[:, 0] * around(value, i, j, 1), axis=(1, 2)) + bias
            for i, j in np.ndindex(height, width)
        ]
        values.append(np.stack(placed, axis=1))
    keys, values = np.concatenate(keys, axis=1), np.concatenate(values, axis=1)
    query = pointwise(module.query, student)
    found = np.empty_like(student)
    side = 12 // heads
    for head in range(heads):
        part = slice(head * side, (head + 1) * side)
        for i, j in np.ndindex(H, W):
            scores = np.exp(query[part, i, j] @ keys[part] / np.sqrt(side))
            found[part, i, j] = values[part] @ (scores / scores.sum())
    expected = student + pointwise(module.out, found)
    inputs = (torch.from_numpy(x)[None] for x in (student, teacher))
    np.testing.assert_allclose(module(*inputs, rates)[0].detach().numpy(), expected, rtol=1e-8, atol=1e-12)
