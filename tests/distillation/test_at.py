"""What is special about AT: no adapters, and a scale that does not matter."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.nn import functional as F

from detdistill.distillation.alignment import resize_like
from detdistill.distillation.methods.at import ATLoss

from .pairs import STRIDES, batch, make_pair


def test_unequal_channels_need_no_adapter():
    pair = make_pair(["at"])
    assert pair.student.pyramid_channels[8] != pair.teacher.pyramid_channels[8]
    assert not list(pair.methods.parameters())
    assert pair.train()(*batch())["at"] > 0


def test_strides_that_differ_are_resized():
    at = make_pair(["at"]).methods["at"]
    student, teacher = torch.randn(2, 16, 4, 4), torch.randn(2, 24, 8, 8)
    resized = F.interpolate(student, size=(8, 8), mode="bilinear", align_corners=False)
    value = at(
        SimpleNamespace(
            student=dict.fromkeys(STRIDES, student),
            teacher=dict.fromkeys(STRIDES, teacher),
            alignment=resize_like,
        )
    )
    torch.testing.assert_close(value, 3 * ATLoss()(resized, teacher))


def test_the_scale_of_a_map_does_not_matter():
    student, teacher = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    scale = torch.tensor([0.01, 100.0])[:, None, None, None]  # of each image
    torch.testing.assert_close(ATLoss()(student * scale, teacher), ATLoss()(student, teacher))


def test_a_map_of_zeros_has_a_finite_gradient():
    student = torch.zeros(1, 3, 4, 4, requires_grad=True)
    loss = ATLoss()(student, torch.randn(1, 3, 4, 4))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
