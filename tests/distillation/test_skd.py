"""What is special about SKD: the range, the window, and maps without structure."""

from __future__ import annotations

import copy

import pytest
import torch

from detdistill.distillation.methods import skd
from detdistill.distillation.methods.skd import SKDLoss, blur, ssim
from detdistill.distillation.pair import Pair

from .pairs import detector, make_pair


def test_scale_and_shift_of_a_level_do_not_matter():
    student, teacher = torch.randn(2, 3, 12, 12).double(), torch.randn(2, 3, 12, 12).double()
    torch.testing.assert_close(
        SKDLoss()(7 * student - 3, teacher), SKDLoss()(student, teacher), rtol=1e-4, atol=0
    )


def test_it_lies_between_0_and_alpha():
    x = torch.rand(1, 2, 16, 16).double()
    assert SKDLoss(alpha=4.0)(x, x).item() == pytest.approx(0, abs=1e-12)
    checker = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    opposite = SKDLoss(alpha=4.0)(checker[None, None].double(), 1 - checker[None, None].double()).item()
    assert 3.5 < opposite <= 4.0  # structure of opposite sign


def test_parts_make_the_whole(monkeypatch):
    student, teacher = torch.randn(3, 2, 12, 12).double(), torch.randn(3, 2, 12, 12).double()
    results = []
    for part in (2**23, 2 * student[0].numel(), 1):  # the batch, two images and one, image by image
        monkeypatch.setattr(skd, "PART", part)
        loss = SKDLoss()(student.requires_grad_(), teacher)
        results.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (6, 40), (10, 10), (11, 11), (30, 12)])
def test_a_window_fits_every_map(size):
    x = torch.rand(2, 3, *size)
    assert blur(x).shape == x.shape
    torch.testing.assert_close(blur(torch.ones_like(x)), torch.ones_like(x))
    assert ssim(x, x).shape == x.shape


def test_one_cell_compares_values_alone():
    x, y = torch.tensor(0.2), torch.tensor(0.6)
    value = ssim(x.view(1, 1, 1, 1), y.view(1, 1, 1, 1)).item()
    assert value == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4))


def test_constant_maps_are_finite():
    student = torch.full((1, 2, 12, 12), 3.0, requires_grad=True)
    for teacher in (torch.randn(1, 2, 12, 12), torch.zeros(1, 2, 12, 12)):
        loss = SKDLoss()(student, teacher)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


def test_adapters_only_where_channels_differ():
    assert len(make_pair(["skd"]).methods["skd"].align.adapters) == 3
    student = detector()
    same = Pair(student, copy.deepcopy(student), ["skd"])
    assert not same.methods["skd"].align.adapters
