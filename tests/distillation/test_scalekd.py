from __future__ import annotations

import pytest
import torch

from detdistill.distillation.pair import Pair
from detdistill.errors import UserError

from .pairs import batch, detector, make_pair, snapshot, take_steps

FAMILIES = ("fcos", "retinanet", "faster_rcnn")


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_assistant_learns_from_the_ground_truth_and_the_student_does_not(family):
    """With all weights at 0 only the assistant's own loss is left."""
    weights = {"feature_weight": 0, "cls_weight": 0, "box_weight": 0}
    pair = make_pair([{"scalekd": weights}], family).train()
    value = pair(*batch())["scalekd"]
    value.backward()
    assert value.item() == 0
    assert not gradients(pair.student)
    moved = gradients(pair.methods)
    assert any(".head." in name for name in moved)
    assert any(".attention.query" in name for name in moved)
    assert not any(".decoupled." in name for name in moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_students_predictions_follow_from_a_third_of_training_on(family):
    values = []
    for step in (0, 9):
        pair = make_pair([{"scalekd": {"feature_weight": 0}}], family).train()
        pair.at_step(step, 10)
        pair(*batch())["scalekd"].backward()
        values.append(bool(gradients(pair.student)))
        assert gradients(pair.methods)  # the assistant learns from the start
    assert values == [False, True]


def test_imitation_does_not_move_the_assistant():
    found = []
    for weight in (0.0, 50.0):
        pair = make_pair([{"scalekd": {"cls_weight": weight, "box_weight": weight}}]).train()
        pair(*batch())["scalekd"].backward()
        found.append({name: g for name, g in gradients(pair.methods).items() if ".decoupled." not in name})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_the_assistants_head_is_its_own():
    pair = make_pair(["scalekd"])
    student, head = pair.student.head, pair.methods["scalekd"].head
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), head.parameters(), strict=True))
    assert not {id(p) for p in student.parameters()} & {id(p) for p in head.parameters()}
    before = snapshot(student)
    take_steps(pair)
    assert any(not torch.equal(before[name], value) for name, value in snapshot(head).items())


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("fcos", "faster_rcnn"), ("retinanet", "fcos"), ("faster_rcnn", "retinanet")],
)
def test_any_teacher_will_do(student, teacher):
    assert take_steps(make_pair(["scalekd"], student, teacher), steps=1)["scalekd"].isfinite()


@pytest.mark.parametrize("student", ["fcos", "faster_rcnn"])
def test_levels_that_are_not_matched_keep_the_students_map(student):
    teacher = detector("fcos", channels=24, seed=1, strides=(8, 16))
    pair = Pair(detector(student), teacher, ["scalekd"])
    assert take_steps(pair, steps=1)["scalekd"].isfinite()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_learns_in_half_precision(family):
    pair = make_pair(["scalekd"], family).train()
    with torch.autocast("cpu", torch.bfloat16):
        value = pair(*batch())["scalekd"]
    value.backward()
    assert all(p.grad is not None for p in pair.methods.parameters())
    assert any(".decoupled." in name for name in gradients(pair.methods))


def test_presets():
    for family, expected in (("fcos", (0.01, 0.2, 0.05)), ("faster_rcnn", (0.07, 0.5, 0.2))):
        loss = make_pair(["scalekd"], family).methods["scalekd"].loss
        assert (loss.feature_weight, loss.predictions.cls_weight, loss.predictions.box_weight) == expected


def test_wrong_options():
    with pytest.raises(UserError, match="imitate_from"):
        make_pair([{"scalekd": {"imitate_from": 2.0}}])
    with pytest.raises(UserError, match="temperature"):
        make_pair([{"scalekd": {"temperature": 0.0}}])
