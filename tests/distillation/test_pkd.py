"""What is special about PKD: presets by kind, invariance, and channels without variance."""

from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods.pkd import PKDLoss

from .pairs import make_pair


@pytest.mark.parametrize(("family", "alpha"), [("fcos", 10.0), ("retinanet", 10.0), ("faster_rcnn", 6.0)])
def test_published_settings_by_the_students_kind(family, alpha):
    pkd = make_pair(["pkd"], family, strides=(8, 16, 32, 64, 128)).methods["pkd"]
    assert pkd.loss.alpha == alpha
    assert [level.student_stride for level in pkd.align.levels] == [8, 16, 32, 64]


def test_scale_and_shift_of_a_channel_do_not_matter():
    student, teacher = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 3, 6, 6).double()
    scale, shift = torch.tensor([[0.1, 1.0, 20.0], [-3.0, 5.0, 0.0]]).double()[..., None, None]
    loss = PKDLoss()
    torch.testing.assert_close(
        loss(student * scale + shift, teacher), loss(student, teacher), rtol=1e-4, atol=0
    )


def test_a_large_mean_costs_no_precision():
    student, teacher = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    wanted = PKDLoss()(student.double(), teacher.double()).item()
    assert PKDLoss()(student + 100, teacher + 100).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_constant_channels_are_finite(value):
    student = torch.randn(2, 3, 5, 5)
    student[:, 1] = value
    student.requires_grad_()
    teacher = torch.randn(2, 3, 5, 5)
    teacher[:, 2] = value
    loss = PKDLoss()(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_a_single_value_says_nothing():
    student = torch.randn(1, 4, 1, 1, requires_grad=True)
    loss = PKDLoss()(student, torch.randn(1, 4, 1, 1))
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()
