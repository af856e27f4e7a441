"""What is special to FRS: a preset for each kind, and pairs whose scores cannot be compared."""

from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods.frs import FRSLoss, richness
from detdistill.errors import UserError

from .pairs import batch, make_pair, take_steps


@pytest.mark.parametrize(
    ("family", "weights"), [("retinanet", (0.005, 0.02)), ("fcos", (0.01, 0.05)), ("faster_rcnn", (0.002, 0.1))]
)
def test_weights_of_each_kind(family, weights):
    loss = make_pair(["frs"], family).methods["frs"].loss
    assert (loss.feature_weight, loss.cls_weight) == weights


@pytest.mark.parametrize(
    ("student", "teacher", "options"),
    [("fcos", "faster_rcnn", {}), ("retinanet", "fcos", {}), ("fcos", "retinanet", {"preset": "gfl"})],
)
def test_scores_of_unlike_heads_are_refused_until_they_are_left_out(student, teacher, options):
    with pytest.raises(UserError, match="use `cls_weight: 0`"):
        make_pair([{"frs": options}], student, teacher)
    pair = make_pair([{"frs": {**options, "cls_weight": 0}}], student, teacher)
    assert take_steps(pair, steps=1)["frs"] > 0


def test_scores_reach_the_head_and_only_with_their_weight():
    for weight, reached in ((0.05, True), (0, False)):
        pair = make_pair([{"frs": {"cls_weight": weight}}]).train()
        pair(*batch())["frs"].backward()
        gradient = pair.student.head.cls.weight.grad
        assert (gradient is not None and bool(gradient.any())) == reached


def test_richness_is_the_teachers_and_carries_no_gradient():
    logits = torch.randn(2, 6, 4, 5, requires_grad=True)
    m = richness(logits)
    assert m.shape == (2, 4, 5)
    assert not m.requires_grad
    assert richness(logits.bfloat16()).dtype == torch.float32


def test_cells_where_the_teacher_sees_nothing_do_not_count():
    torch.manual_seed(0)
    student, teacher, logits = torch.randn(3, 2, 3, 4, 5)
    padded = [torch.nn.functional.pad(x, (0, 3, 0, 2), value=9.0) for x in (student, -teacher)]
    wider = torch.nn.functional.pad(logits, (0, 3, 0, 2), value=-200.0)
    torch.testing.assert_close(
        FRSLoss()(student, -teacher, richness(logits)), FRSLoss()(*padded, richness(wider))
    )


def test_a_teacher_that_sees_nothing_at_all_is_finite():
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    logits = torch.full((2, 3, 4, 5), -500.0)
    loss = FRSLoss().scores(student, logits, richness(logits)) + FRSLoss()(student, student, richness(logits))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
