"""FGFI against its formulas in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.fgfi import FGFILoss, near_anchors

from .differences import assert_golden, random_maps


def fgfi(student, teacher, mask, alpha=0.01):
    """alpha / (2 N_p) · sum_ij I_ij sum_c (s - t)²."""
    total = 0.0
    for n, c, i, j in np.ndindex(student.shape):
        total += mask[n, i, j] * (student[n, c, i, j] - teacher[n, c, i, j]) ** 2
    return alpha * total / (2 * mask.sum())


def overlap(a, b, more=0):
    """IoU; ``more`` is 1 in the published code."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + more) for i in (0, 1))
    area_a, area_b = ((box[2] - box[0] + more) * (box[3] - box[1] + more) for box in (a, b))
    return width * height / (area_a + area_b - width * height)


def near(boxes, anchors_HWA4, psi=0.5, more=0):
    """I_ij: any anchor at ij above psi times the object's best overlap, for any object."""
    height, width, count, _ = anchors_HWA4.shape
    mask = np.zeros((height, width), dtype=bool)
    for box in boxes:
        best = max(overlap(box, anchors_HWA4[index], more) for index in np.ndindex(height, width, count))
        for i, j, a in np.ndindex(height, width, count):
            mask[i, j] |= overlap(box, anchors_HWA4[i, j, a], more) > psi * best
    return mask


def test_value_and_gradient():
    mask = np.random.default_rng(2).integers(0, 2, (2, 5, 6)).astype(float)
    loss = FGFILoss()
    assert_golden(
        lambda s, t, m: loss(s, t, m > 0), fgfi, *random_maps((2, 3, 5, 6)), mask, also=range(0, 30, 7)
    )


def test_cells_near_an_objects_anchors():
    generator = np.random.default_rng(0)
    y, x = (8 * grid + 4.0 for grid in np.mgrid[:6, :7])
    half = np.array([[6.0, 6.0], [9.0, 4.0], [4.0, 9.0]])
    centers = np.stack([x, y], axis=-1)[:, :, None]
    anchors_HWA4 = np.concatenate([centers - half, centers + half], axis=-1)
    for _ in range(5):
        corner = generator.uniform(0, 30, (2, 2))
        boxes = np.concatenate([corner, corner + generator.uniform(3, 25, (2, 2))], axis=1)
        for psi in (0.0, 0.5, 0.9):
            expected = near(boxes, anchors_HWA4, psi)
            assert 0 < expected.sum() < expected.size
            found = near_anchors(torch.tensor(boxes), torch.tensor(anchors_HWA4).view(-1, 4), (6, 7), psi)
            np.testing.assert_array_equal(found.numpy(), expected)


def test_what_sides_one_pixel_longer_change():
    """The declared deviation, measured: the published IoU on the same boxes and anchors."""
    generator = np.random.default_rng(0)
    y, x = (8 * grid + 4.0 for grid in np.mgrid[:20, :20])
    half = 16 * np.array([[1.0, 1.0], [1.41, 0.71], [0.71, 1.41]])
    centers = np.stack([x, y], axis=-1)[:, :, None]
    anchors_HWA4 = np.concatenate([centers - half, centers + half], axis=-1)
    different, cells = 0, 0
    for _ in range(40):
        sides = np.exp(generator.uniform(np.log(8), np.log(100), 2))
        corner = generator.uniform(0, 1, 2) * (160 - sides)
        box = np.concatenate([corner, corner + sides])[None]
        found = near_anchors(torch.tensor(box), torch.tensor(anchors_HWA4).view(-1, 4), (20, 20), 0.5)
        published = near(box, anchors_HWA4, more=1)
        different, cells = different + (found.numpy() != published).sum(), cells + published.sum()
    assert different / cells == pytest.approx(0.041, abs=0.002)
