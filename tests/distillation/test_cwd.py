"""What is special about CWD: presets, large values, and what a softmax does not see."""

from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods.cwd import CWDLoss
from detdistill.errors import UserError
from detdistill.recipe.methods import CWDOptions

from .pairs import make_pair


def test_presets():
    strides = (8, 16, 32, 64, 128)
    cwd = make_pair(["cwd"], "retinanet", strides=strides).methods["cwd"]
    assert (cwd.loss.alpha, cwd.loss.tau, len(cwd.align.levels)) == (10.0, 1.0, 5)
    cwd = make_pair([{"cwd": {"preset": "retinanet_x101"}}], "retinanet", strides=strides).methods["cwd"]
    assert (cwd.loss.alpha, cwd.loss.tau, len(cwd.align.levels)) == (5.0, 1.0, 4)
    assert CWDOptions.presets["segmentation"] == {"alpha": 50.0, "tau": 4.0, "logits_alpha": 3.0}


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(UserError, match=r"^cwd: tau: input should be greater than 0 \(got 0\)$"):
        make_pair([{"cwd": {"tau": 0}}])


def test_large_values_do_not_underflow():
    student, teacher = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    student[0, 0, 0, 0] = 1000.0
    teacher[0, 0, 1, 1] = 1000.0
    student.requires_grad_()
    loss = CWDLoss(alpha=1.0)(student, teacher)
    assert loss.item() == pytest.approx(1000.0)  # the logarithm of a softmax would be -inf
    loss.backward()
    torch.testing.assert_close(student.grad[0, 0], torch.tensor([[1.0, 0.0], [0.0, -1.0]]))


def test_a_constant_added_to_a_channel_does_not_matter():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    shift = torch.tensor([-5.0, 0.0, 7.0])[:, None, None]
    torch.testing.assert_close(CWDLoss()(student + shift, teacher), CWDLoss()(student, teacher))
