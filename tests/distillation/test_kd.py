from __future__ import annotations

import pytest
import torch

from detdistill.config import UserError
from detdistill.distillation.methods.kd import KDLoss
from detdistill.distillation.pair import Pair

from .gfl import gfl
from .pairs import CLASSES, batch, detector, make_pair


def test_presets_follow_the_encoding_of_boxes():
    for family, expected in (("fcos", 0.25), ("retinanet", 1.0), ("faster_rcnn", 1.0)):
        assert make_pair(["kd"], family).methods["kd"].loss.box_weight == expected


@pytest.mark.parametrize("name", ["kd", "dist"])
def test_two_stage_runs_only_the_teachers_second_stage(name):
    pair = make_pair([name], "faster_rcnn")
    assert not pair.methods[name].needs
    pair.teacher.rpn = None  # would fail if it were called
    assert pair.train()(*batch())[name].isfinite()


@pytest.mark.parametrize("name", ["kd", "dist"])
def test_two_stage_models_may_differ_in_levels(name):
    teacher = detector("faster_rcnn", channels=24, seed=1, strides=(8, 16, 32, 64), anchor_scale=4.0)
    pair = Pair(detector("faster_rcnn"), teacher, [name])
    assert pair.train()(*batch())[name].isfinite()


@pytest.mark.parametrize("name", ["kd", "dist"])
@pytest.mark.parametrize(("student", "teacher"), [("fcos", "faster_rcnn"), ("faster_rcnn", "fcos")])
def test_heads_of_other_kinds_are_refused(name, student, teacher):
    with pytest.raises(UserError, match="use a method on features"):
        make_pair([name], student, teacher)


@pytest.mark.parametrize("name", ["kd", "dist"])
def test_other_classes_are_refused(name):
    teacher = detector("faster_rcnn", seed=1)
    teacher.classes = tuple(reversed(CLASSES))
    with pytest.raises(UserError, match="classes"):
        Pair(detector("faster_rcnn"), teacher, [name])


@pytest.mark.parametrize("name", ["kd", "scalekd"])
def test_boxes_as_distributions_are_left_to_ld(name):
    torch.manual_seed(0)
    with pytest.raises(UserError, match="`box_weight: 0`"):
        Pair(gfl(), gfl(), [name])
    pair = Pair(gfl(), gfl(channels=24), [{name: {"box_weight": 0}}])
    assert pair.train()(*batch())[name].isfinite()


@pytest.mark.parametrize("name", ["kd", "dist"])
def test_levels_can_be_left_out(name):
    pair = make_pair([{name: {"finest": 1}}])
    pyramid = pair.teacher.pyramid
    before = pair.train()(*batch())[name].item()
    pair.teacher.pyramid = lambda inputs: {s: x if s == 8 else 5 * x for s, x in pyramid(inputs).items()}
    assert pair(*batch())[name].item() == before
    pair.teacher.pyramid = lambda inputs: {s: 5 * x if s == 8 else x for s, x in pyramid(inputs).items()}
    assert pair(*batch())[name].item() != before


def test_a_sure_teacher_weighs_more_than_its_background():
    """The mean is over what the teacher sees: ten times the background hardly changes it."""
    loss = KDLoss()
    student = torch.zeros(1, 200, 3)
    teacher = torch.full((1, 200, 3), -9.0)
    teacher[0, :4] = 4.0
    few = loss(student[:, :20], teacher[:, :20])
    assert loss(student, teacher).item() == pytest.approx(few.item(), rel=0.02)


def test_a_box_term_alone():
    logits, boxes = torch.zeros(1, 5, 3), torch.ones(1, 5, 4)
    assert KDLoss(cls_weight=0)(logits, logits, boxes, 2 * boxes).item() == pytest.approx(4)
    assert KDLoss(cls_weight=0, box_weight=0)(logits, logits + 1, boxes, 2 * boxes).item() == 0


def test_temperature_must_be_positive():
    with pytest.raises(UserError, match="temperature"):
        make_pair([{"kd": {"temperature": 0.0}}])
