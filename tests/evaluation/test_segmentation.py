"""Confusion, IoU and accuracy of label maps, against scikit-learn and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score
from torch import Tensor

from detdistill.data.records import Split
from detdistill.evaluation.segmentation import SegmentationEvaluation, confusion_of


def measured(confusion: Tensor) -> SegmentationEvaluation:
    count = len(confusion)
    split = Split("val", [], tuple("abcdefgh"[:count]), tuple(range(count)), Path("labels"))
    return SegmentationEvaluation(
        confusion=confusion, label_maps={}, image_accuracies=torch.zeros(0), split=split, seconds=1.0,
        images_per_second=1.0,
    )  # fmt: skip


def test_numbers_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    true, given = rng.integers(0, 5, (30, 40)), rng.integers(0, 5, (30, 40))
    given[:, :25] = true[:, :25]
    confusion = confusion_of(torch.from_numpy(true), torch.from_numpy(given), 5)
    np.testing.assert_array_equal(confusion[:, :5].numpy(), confusion_matrix(true.ravel(), given.ravel()))
    evaluation = measured(confusion)
    iou = jaccard_score(true.ravel(), given.ravel(), average=None)
    numbers = evaluation.numbers()
    np.testing.assert_allclose(list(evaluation.per_class.values()), iou)
    assert numbers["mIoU"] == pytest.approx(iou.mean())
    assert numbers["pixel_accuracy"] == pytest.approx(accuracy_score(true.ravel(), given.ravel()))
    assert numbers["mean_accuracy"] == pytest.approx(balanced_accuracy_score(true.ravel(), given.ravel()))
    assert next(iter(numbers)) == evaluation.main == "mIoU"


def test_by_hand_with_ignored_and_foreign_classes() -> None:
    true = torch.tensor([[0, 0, 1], [1, 255, 255]], dtype=torch.uint8)
    given = torch.tensor([[0, 1, 1], [-1, 0, 1]])  # -1: a class that the split does not have
    confusion = confusion_of(true, given, 3)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    evaluation = measured(confusion)
    assert evaluation.per_class["a"] == pytest.approx(1 / 2)  # one right, one missed
    assert evaluation.per_class["b"] == pytest.approx(1 / 3)  # one right, one false, one missed
    assert math.isnan(evaluation.per_class["c"])  # nowhere: no part of the means
    assert evaluation.numbers() == pytest.approx(
        {"mIoU": (1 / 2 + 1 / 3) / 2, "pixel_accuracy": 2 / 4, "mean_accuracy": 1 / 2}
    )


def test_classes_without_a_pixel_are_named() -> None:
    """All pixels are right and mIoU is 1, of one class of two: what the number does not say."""
    evaluation = measured(confusion_of(torch.tensor([[0, 0, 255]]), torch.tensor([[0, 0, 1]]), 2))
    assert evaluation.numbers()["mIoU"] == 1
    assert evaluation.warnings() == ["warning: val has no pixel of b: mIoU does not measure them"]
    assert not measured(confusion_of(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), 2)).warnings()


def test_a_class_that_is_only_given_counts_as_zero() -> None:
    evaluation = measured(confusion_of(torch.tensor([[0, 0]]), torch.tensor([[0, 1]]), 2))
    assert evaluation.per_class == {"a": 0.5, "b": 0.0}
    assert evaluation.numbers()["mIoU"] == 0.25
    assert evaluation.numbers()["mean_accuracy"] == 0.5


def test_nothing_labeled_is_not_a_number() -> None:
    numbers = measured(confusion_of(torch.full((4, 4), 255), torch.zeros(4, 4), 2)).numbers()
    assert all(math.isnan(value) for value in numbers.values())


def test_matrices_of_images_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    true, given = (torch.randint(0, 4, (2, 8, 8), generator=generator) for _ in range(2))
    parts = sum(confusion_of(t, g, 4) for t, g in zip(true, given, strict=True))
    assert torch.equal(parts, confusion_of(true, given, 4))
