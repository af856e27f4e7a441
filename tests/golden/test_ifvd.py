"""IFVD against its formula in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.ifvd import IFVDLoss
from detdistill.distillation.methods.kd import KDLoss

from .differences import assert_golden, random_maps

LABELS = np.random.default_rng(0).integers(0, 3, (2, 4, 5))
LABELS[0, 0] = 255
LABELS[1] = np.where(LABELS[1] == 2, 1, LABELS[1])  # a class that one image lacks


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def variations(feature, labels):
    """By place: the cosine of its feature with the mean feature of its class in this image."""
    means = {k: feature[:, labels == k].mean(axis=1) for k in np.unique(labels)}
    return np.array([
        [cosine(feature[:, i, j], means[labels[i, j]]) for j in range(labels.shape[1])]
        for i in range(labels.shape[0])
    ])  # fmt: skip


def ifvd(student, teacher, labels, alpha=200.0):
    labels = labels.astype(int)
    squares = np.concatenate([
        ((variations(s, k) - variations(t, k)) ** 2)[k != 255]
        for s, t, k in zip(student, teacher, labels, strict=True)
    ])  # fmt: skip
    return alpha * squares.mean()


def test_value_and_gradient():
    student, teacher = random_maps((2, 3, 4, 5), teacher_shape=(2, 6, 4, 5))

    def loss(s, t):
        return IFVDLoss()(s, t, torch.tensor(LABELS), 3)

    assert_golden(loss, lambda s, t: ifvd(s, t, LABELS), student, teacher)


@pytest.mark.parametrize("classes", [3, 19])
def test_the_kd_of_the_published_whole_has_weight_10_over_the_classes(classes):
    """The published divergence is torch's with its default reduction, a mean over pixels and classes."""
    student, teacher = random_maps((2, classes, 4, 5))

    def published(s, t):
        s, t = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (s, t))
        return 10 * np.mean(t * np.log(t / s))

    kd = KDLoss(cls_weight=10 / classes)
    everywhere = torch.ones(2, 4, 5, dtype=torch.bool)
    assert_golden(lambda s, t: kd.pixels(s, t, everywhere), published, student, teacher)


def test_without_a_label_there_is_nothing():
    student, teacher = (torch.randn(2, 3, 4, 5) for _ in range(2))
    loss = IFVDLoss()(student.requires_grad_(), teacher, torch.full((2, 4, 5), 255), 3)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


def test_what_unlabeled_pixels_hold_does_not_matter():
    student, teacher = (torch.randn(2, 3, 4, 5) for _ in range(2))
    labels = torch.tensor(LABELS)
    before = IFVDLoss()(student, teacher, labels, 3)
    student[0, :, 0] = 99.0
    torch.testing.assert_close(IFVDLoss()(student, teacher, labels, 3), before)


def test_pixels_and_classes_without_a_feature_have_finite_gradients():
    student, teacher = torch.zeros(1, 3, 4, 5, requires_grad=True), torch.randn(1, 3, 4, 5)
    IFVDLoss()(student, teacher, torch.tensor(LABELS[:1]), 7).backward()
    assert student.grad.isfinite().all()
