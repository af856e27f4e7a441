from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods.kd import KDLoss
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError

from .pairs import batch, detector, gfl_pair, make_pair, take_steps


def test_presets_follow_the_encoding_of_boxes():
    for family, expected in (("fcos", 0.25), ("gfl", 0.25), ("retinanet", 1.0), ("faster_rcnn", 1.0)):
        assert make_pair(["kd"], family).methods["kd"].loss.box_weight == expected


@pytest.mark.parametrize("name", ["kd", "dist"])
def test_two_stage_runs_only_the_teachers_second_stage(name):
    pair = make_pair([name], "faster_rcnn")
    assert "outputs" not in pair.methods[name].requires
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
    teacher.classes = ("x", "y", "z")
    with pytest.raises(UserError, match="none is shared"):
        Pair(detector("faster_rcnn"), teacher, [name])


def test_of_distributions_the_means_are_compared():
    pair = gfl_pair([{"kd": {"cls_weight": 0, "box_weight": 1}}], bins=9).eval()  # the teacher has 17
    images, targets = batch(n=1)
    inputs = pair.student.preprocess(images, targets)
    all_outputs = [
        model.forward_head(model.forward_features(inputs), inputs) for model in (pair.student, pair.teacher)
    ]
    weights, sides = [], [[], []]
    for stride in all_outputs[0].box:
        weights.append(all_outputs[1].cls[stride].sigmoid().amax(dim=1).flatten())
        for outputs, bins, found in zip(all_outputs, (9, 17), sides, strict=True):
            shares = outputs.box[stride][0].unflatten(0, (4, bins)).softmax(dim=1)
            found.append((shares * torch.arange(bins)[:, None, None]).sum(dim=1).flatten(1))
    weight, student, teacher = torch.cat(weights), *(torch.cat(found, dim=1) for found in sides)
    wanted = (weight * (student - teacher).abs().sum(dim=0)).sum() / weight.sum().clamp(min=1)
    assert pair(images, targets)["kd"].item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["kd", "scalekd", "gid"])
def test_methods_on_boxes_teach_heads_with_distributions(name):
    pair = gfl_pair([name])
    assert take_steps(pair, steps=1)[name].item() > 0
    pair.zero_grad()
    pair(*batch())[name].backward()
    assert pair.student.head.box.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["kd", "dist"])
def test_levels_can_be_left_out(name):
    pair = make_pair([{name: {"finest": 1}}])
    pyramid = pair.teacher.forward_features
    before = pair.train()(*batch())[name].item()
    pair.teacher.forward_features = lambda inputs: {
        s: x if s == 8 else 5 * x for s, x in pyramid(inputs).items()
    }
    assert pair(*batch())[name].item() == before
    pair.teacher.forward_features = lambda inputs: {
        s: 5 * x if s == 8 else x for s, x in pyramid(inputs).items()
    }
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
