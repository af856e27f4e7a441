"""MasKD against its formulas in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.maskd import MasKDLoss, ReceptiveTokens

from .differences import assert_golden, random_maps

N, C, H, W, TOKENS = 2, 3, 3, 4, 5


def masks_and_shares():
    generator = np.random.default_rng(3)
    shares = generator.uniform(0.1, 1.0, (N, TOKENS))
    return generator.uniform(0.01, 0.99, (N, TOKENS, H, W)), shares / shares.sum(axis=1, keepdims=True)


def maskd(student, teacher, masks, shares, alpha):
    total = 0.0
    for n, i, c in np.ndindex(N, TOKENS, C):
        mask = masks[n, i]
        value = np.sum(mask**2 * (student[n, c] - teacher[n, c]) ** 2) / np.sum(mask)
        total += (1 / TOKENS if shares is None else shares[n, i]) * value / (C * N)
    return alpha * total


def dice(masks):
    pairs = []
    for n, i, j in np.ndindex(len(masks), TOKENS, TOKENS):
        if i != j:
            a, b = masks[n, i], masks[n, j]
            pairs.append(2 * np.sum(a * b) / (np.sum(a**2) + np.sum(b**2)))
    return np.mean(pairs)


@pytest.mark.parametrize("shared", [True, False])
def test_value_and_gradient(shared):
    student, teacher = random_maps((N, C, H, W))
    masks, shares = masks_and_shares()
    if shared:
        assert_golden(
            MasKDLoss(alpha=7.0), lambda *a: maskd(*a, 7.0), student, teacher, masks, shares, coordinates=30
        )
    else:
        assert_golden(
            MasKDLoss(alpha=7.0), lambda *a: maskd(*a, None, 7.0), student, teacher, masks, coordinates=30
        )


def test_overlap():
    assert_golden(MasKDLoss().overlap, dice, masks_and_shares()[0], coordinates=30)


def test_a_single_mask_overlaps_with_nothing():
    assert MasKDLoss().overlap(torch.rand(2, 1, 3, 3)).item() == 0


def test_tokens():
    """masks sigmoid(E · x), and x times the sum of masks, each by its share."""
    torch.manual_seed(0)
    tokens = ReceptiveTokens(C, TOKENS, weighted=True).double()
    torch.nn.init.normal_(tokens.share.weight)
    torch.nn.init.normal_(tokens.tokens_TC)
    x = np.random.default_rng(0).normal(size=(N, C, H, W))
    masked, masks = (y.detach().numpy() for y in tokens(torch.from_numpy(x)))
    rows = tokens.tokens_TC.detach().numpy()
    weight, bias = (y.detach().numpy() for y in tokens.share.parameters())
    for n in range(N):
        shares = np.exp(weight @ x[n].mean(axis=(1, 2)) + bias)
        shares /= shares.sum()
        for i, j in np.ndindex(H, W):
            expected = 1 / (1 + np.exp(-rows @ x[n, :, i, j]))
            np.testing.assert_allclose(masks[n, :, i, j], expected, rtol=1e-9)
            np.testing.assert_allclose(masked[n, :, i, j], x[n, :, i, j] * (shares @ expected), rtol=1e-9)
