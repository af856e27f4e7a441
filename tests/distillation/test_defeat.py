"""What is special to DeFeat: objects by their level, the background, and the term of two-stage heads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.defeat import DeFeatLoss, level_mask
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models import build_model
from detdistill.models.base import Batch
from detdistill.recipe import model_config

from ..golden.test_defeat import head
from .pairs import batch, detector, make_pair


def test_an_object_is_on_the_level_that_the_rule_of_fpn_gives_it():
    boxes = torch.tensor([[0.0, 0, 60, 60], [100, 100, 220, 220], [0, 0, 250, 250]])  # strides 4, 8, 16
    inputs = Batch(torch.zeros(1, 3, 256, 256), [(256, 256)], [(256, 256)], [{"boxes": boxes}])
    strides = [4, 8, 16]
    masks = {s: level_mask(inputs, torch.zeros(1, 1, 256 // s, 256 // s), s, strides)[0] for s in strides}
    assert masks[4].sum() == 15 * 15
    assert masks[8].sum() == 16 * 16
    assert masks[8][12:28, 12:28].all()
    assert masks[16].sum() == 16 * 16


def test_levels_beyond_those_distilled_fall_to_the_nearest():
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 256, 256]])
    inputs = Batch(torch.zeros(1, 3, 256, 256), [(256, 256)], [(256, 256)], [{"boxes": boxes}])
    assert level_mask(inputs, torch.zeros(1, 1, 32, 32), 8, [8]).all()


@pytest.mark.parametrize("everything", [True, False])
def test_no_background_or_no_object(everything):
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    mask = torch.full((2, 4, 5), everything)
    loss = DeFeatLoss()(student, torch.zeros(2, 3, 4, 5), mask)
    loss.backward()
    weight = 3.0 if everything else 12.0
    torch.testing.assert_close(loss, weight / 2 * student.square().mean())
    assert student.grad.isfinite().all()


def test_regions_that_are_all_background():
    logits = torch.randn(6, 4, requires_grad=True)
    loss = DeFeatLoss(head_background_weight=2.0).head(
        logits, torch.randn(6, 4), torch.zeros(6, dtype=torch.bool)
    )
    loss.backward()
    assert loss > 0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("student", "teacher", "preset", "expected"),
    [
        ("faster_rcnn", "faster_rcnn", None, False),
        ("faster_rcnn", "faster_rcnn", "head", True),
        ("faster_rcnn", "retinanet", "head", False),
        ("fcos", "fcos", "head", False),
    ],
)
def test_the_head_has_a_term_between_two_stage_detectors(student, teacher, preset, expected):
    pair = make_pair([{"defeat": {"preset": preset} if preset else {}}], student, teacher).train()
    assert (pair.methods["defeat"].classes is not None) == expected
    pair(*batch())["defeat"].backward()
    if student == "faster_rcnn":
        gradient = pair.student.roi_head.cls.weight.grad
        assert (gradient is not None and bool(gradient.any())) == expected


def test_the_teacher_is_asked_about_the_students_regions():
    pair = make_pair([{"defeat": {"preset": "head"}}], "faster_rcnn").train()
    seen = []
    classify = pair.teacher.classify
    pair.teacher.classify = lambda pyramid, proposals, *rest: (
        seen.append(proposals) or classify(pyramid, proposals, *rest)
    )
    predict = pair.student.forward_head
    pair.student.forward_head = lambda *args: seen.append(predict(*args)) or seen[-1]
    pair(*batch())
    outputs, proposals = seen
    assert all(torch.equal(a, b) for a, b in zip(outputs.proposals, proposals, strict=True))


def head_alone(regions, **options):
    weights = {"preset": "head", "object_weight": 0.0, "background_weight": 0.0}
    return make_pair([{"defeat": {**weights, "regions": regions}}], "faster_rcnn", **options).train()


def losses_of(pair):
    torch.manual_seed(7)
    return {**pair(*batch()), "the next draw": torch.rand(())}


def test_the_teacher_may_sample_the_regions():
    """Both heads are asked about it, each in its own input; its labels tell objects from background."""
    pair = head_alone("teacher")
    pair.student.preprocessor = replace(pair.student.preprocessor, size=(32, 32))
    pair.teacher.preprocessor = replace(pair.teacher.preprocessor, size=(64, 64))
    asked = {}
    for model in (pair.student, pair.teacher):
        classify = model.classify

        def classified(pyramid, regions, inputs, model=model, classify=classify):
            logits = classify(pyramid, regions, inputs)[0]
            asked[model] = regions, logits.detach().numpy().astype("float64")
            return classify(pyramid, regions, inputs)

        model.classify = classified
    sample = pair.teacher.sample
    labels = []

    def sampled(*args):
        found = sample(*args)
        labels.append(torch.cat([one.labels_R for one in found]).numpy())
        return found

    pair.teacher.sample = sampled
    losses = losses_of(pair)
    (theirs, teacher_logits), (ours, student_logits) = asked[pair.teacher], asked[pair.student]
    assert all(torch.equal(a / 2, b) for a, b in zip(theirs, ours, strict=True))
    objects = labels[0] > 0
    assert 0 < objects.sum() < len(objects)
    np.testing.assert_allclose(
        losses["defeat"].item(), head(student_logits, teacher_logits, objects), rtol=1e-5
    )
    losses["defeat"].backward()
    assert pair.student.roi_head.cls.weight.grad.any()
    assert pair.student.backbone.body.conv_stem.weight.grad.any()


def test_both_samples_are_summed_and_the_student_draws_as_without():
    found = {regions: losses_of(head_alone(regions)) for regions in ("student", "teacher", "both")}
    student, teacher, both = (losses.pop("defeat") for losses in found.values())
    assert not torch.equal(student, teacher)
    torch.testing.assert_close(both, student + teacher)
    for losses in found.values():
        assert all(torch.equal(value, found["student"][name]) for name, value in losses.items())


def test_other_classes_are_refused_until_the_head_is_left_out():
    config = model_config(
        family="faster_rcnn", backbone="mobilenetv3_small_050", channels=24, strides=(8, 16, 32)
    )
    teacher = build_model(config, ("x", "y"))
    with pytest.raises(UserError, match="use it without `preset: head`"):
        Pair(detector("faster_rcnn"), teacher, [{"defeat": {"preset": "head"}}])
    Pair(detector("faster_rcnn"), teacher, ["defeat"])


def test_regions_without_a_term_for_them_are_refused():
    with pytest.raises(UserError, match="no term uses regions: add `preset: head`"):
        make_pair([{"defeat": {"regions": "teacher"}}], "faster_rcnn")
