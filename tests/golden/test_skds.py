"""SKDS against its formula in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.skds import SKDSLoss

from .differences import assert_golden, random_maps


def cosines(cells):
    """(G, G) of (C, G)."""
    lengths = np.sqrt((cells**2).sum(axis=0))
    return cells.T @ cells / np.outer(lengths, lengths)


def pooled(feature, rows, columns):
    """(C, G): the greatest of each block of rows × columns."""
    blocks = [
        feature[:, i : i + rows, j : j + columns].max(axis=(1, 2))
        for i in range(0, feature.shape[1], rows)
        for j in range(0, feature.shape[2], columns)
    ]
    return np.stack(blocks, axis=1)


def pairs(student, teacher, rows, columns, weight):
    terms = [
        np.mean((cosines(pooled(s, rows, columns)) - cosines(pooled(t, rows, columns))) ** 2)
        for s, t in zip(student, teacher, strict=True)
    ]
    return weight * np.mean(terms)


def test_pairs_of_the_published_grid():
    student, teacher = random_maps((2, 3, 6, 8), teacher_shape=(2, 5, 6, 8))
    assert_golden(SKDSLoss(), lambda s, t: pairs(s, t, 3, 4, 0.5), student, teacher)


def test_pixels_of_the_published_script():
    """Its cross-entropy is summed over a batch of 8 images, and divided by H·W, with weight 10."""
    student, teacher = random_maps((8, 3, 4, 5))

    def published(s, t):
        s, t = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (s, t))
        entropy = -np.sum(t * np.log(t))  # of the teacher: no gradient
        return 10 * (-np.sum(t * np.log(s)) - entropy) / (4 * 5)

    everywhere = torch.ones(8, 4, 5, dtype=torch.bool)
    assert_golden(lambda s, t: SKDSLoss().pixel_loss.pixels(s, t, everywhere), published, student, teacher)


def test_pairs_of_pooled_windows():
    student, teacher = random_maps((2, 3, 5, 6))
    loss = SKDSLoss(pair_weight=10.0, grid=0, pool=2)
    assert_golden(loss, lambda s, t: pairs(s, t, 2, 2, 10.0), student, teacher)


@pytest.mark.parametrize("options", [{"grid": -1}, {"pool": 0}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match="grid must be"):
        SKDSLoss(**options)
