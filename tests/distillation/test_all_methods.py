"""What must hold for every method on every kind of pair: the pitfalls of other toolkits, one test each."""

from __future__ import annotations

import copy

import pytest
import torch

from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models.checkpoints.io import save_model
from detdistill.models.checkpoints.weights import read_state_dict
from detdistill.recipe import OptimizerConfig
from detdistill.training.step import build_optimizer

from .pairs import DETECTION, assert_same, batch, detector, make_pair, snapshot, take_steps

FAMILIES = ("fcos", "retinanet", "gfl", "reppoints", "faster_rcnn")

REFUSED = {
    ("crosskd", "faster_rcnn"),
    ("gid", "faster_rcnn"),
    *(("ld", family) for family in FAMILIES if family != "gfl"),
}
"""(method, student's family) that make no sense, and say so."""

STILL = {
    # Standardized maps, and softmaxes over a map, do not see a constant: the adapter's bias has no say.
    "ima": ".bias",
    "pkd": ".bias",
    "cwd": ".bias",
    # The assistant's head (GFL) learns a level's scale from that level's objects: here all are on the finest.
    "scalekd": (".scales.16", ".scales.32"),
}
"""Learnable parts that no gradient moves, by the end of their names, with the reason."""

NOT_ZERO = {
    "cofd": "connectors stand between equal maps too",
    "defeat": "adapters stand between equal maps too",
    "dist": "the published epsilon shows on scores that are nearly constant",
    "fgfi": "adapters stand between equal maps too",
    "fkd": "adapters and blocks stand between equal maps too",
    "frs": "adapters stand between equal maps too, and cross-entropy keeps the teacher's entropy",
    "gid": "cross-entropy with soft targets keeps the teacher's entropy",
    "maskd": "adapters stand between equal maps too",
    "mgd": "a generator that has not learned yet",
    "scalekd": "it imitates an assistant of its own",
}
"""Methods whose loss is not 0 when student and teacher are equal, and why; their own tests show when it is."""


def combinations():
    return [(method, family) for method in DETECTION for family in FAMILIES if (method, family) not in REFUSED]


on_fcos = pytest.mark.parametrize("method", [name for name in DETECTION if (name, "fcos") not in REFUSED])
everywhere = pytest.mark.parametrize(("method", "family"), combinations())


@pytest.mark.parametrize(("method", "family"), sorted(REFUSED))
def test_a_pair_that_makes_no_sense_is_refused_with_what_would(method, family):
    with pytest.raises(UserError, match="use") as error:
        make_pair([method], family)
    assert "\n" not in str(error.value)


@everywhere
def test_every_part_is_optimized_moved_and_saved_and_the_teacher_stays(method, family):
    pair = make_pair([method], family)
    assert pair.teacher is not None
    pair.teacher.train()  # as a careless user leaves it
    teacher_before, parts_before = snapshot(pair.teacher), snapshot(pair.methods)
    optimized = {
        id(p) for group in build_optimizer(pair, OptimizerConfig()).param_groups for p in group["params"]
    }
    assert all(id(p) in optimized for p in pair.methods.parameters())
    losses = take_steps(pair)
    assert losses[method].isfinite()
    assert losses[method].requires_grad
    assert_same(teacher_before, snapshot(pair.teacher))
    assert all(p.grad is None and not p.requires_grad for p in pair.teacher.parameters())
    assert not any(module.training for module in pair.teacher.modules())
    parts = dict(pair.methods.named_parameters())
    # A step may be too small for float32: a gradient is as good.
    still = {
        name
        for name, part in parts.items()
        if part.detach().equal(parts_before[name]) and (part.grad is None or not part.grad.any())
    }
    allowed = {name for name in parts if method in STILL and name.endswith(STILL[method])}
    assert still <= allowed
    saved = {name.replace(".", ".method.", 1) for name in snapshot(pair.methods)}
    assert {f"terms.{name}" for name in saved} <= set(pair.state_dict())


@everywhere
def test_gradient_reaches_the_students_backbone(method, family):
    pair = make_pair([method], family).train()
    pair(*batch())[method].backward()
    gradients = [p.grad for p in pair.student.backbone.parameters() if p.grad is not None]
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    assert all(gradient.isfinite().all() for gradient in gradients)


@everywhere
def test_nothing_is_lost_in_a_state_dict(method, family):
    pair = make_pair([method], family)
    take_steps(pair)
    again = make_pair([method], family)
    again.load_state_dict(pair.state_dict())
    values = []
    for each in (pair, again):
        each.at_step(7, 100)
        torch.manual_seed(0)
        values.append(each(*batch(seed=5))[method].item())
        torch.testing.assert_close(values[0], values[-1], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("method", "family"), [pair for pair in combinations() if pair[0] not in NOT_ZERO])
def test_an_equal_student_has_nothing_to_learn(method, family):
    teacher = detector(family, seed=1)
    pair = Pair(copy.deepcopy(teacher), teacher, [_without_mask(method)]).eval()
    pair.student.training = True  # it samples proposals as in training; its BatchNorm stays as the teacher's
    assert pair(*batch())[method].abs().item() < 1e-5


@pytest.mark.parametrize("case", ["empty", "one pixel", "constant", "bf16"])
@everywhere
def test_finite_values_and_gradients(method, family, case):
    pair = make_pair([method], family).train()
    # One cell at stride 32; two images, or BatchNorm would refuse it.
    inputs = batch(size=32 if case == "one pixel" else 64, empty=case == "empty", constant=case == "constant")
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "bf16"):
        losses = pair(*inputs)
    sum(losses.values()).backward()
    assert losses[method].isfinite()
    for name, parameter in pair.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@on_fcos
def test_weight_zero_is_free(method):
    teacher = detector(channels=24, seed=1)
    pair = Pair(detector(), teacher, [{method: {"weight": 0}}]).train()
    teacher.forward_features = None  # would fail if it were called
    assert method not in pair(*batch())
    assert not list(pair.methods.parameters())


@on_fcos
def test_exported_student_is_a_plain_student(method, tmp_path):
    pair = make_pair([method])
    take_steps(pair, steps=1)
    save_model(pair.student, tmp_path / "student.safetensors")
    assert read_state_dict(tmp_path / "student.safetensors").keys() == detector().state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_methods_at_once_each_logged_apart(family):
    methods = [method for method in DETECTION if (method, family) not in REFUSED]
    losses = take_steps(make_pair(methods, family), steps=1)
    assert set(methods) <= losses.keys()
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize(("student", "teacher"), [("fcos", "faster_rcnn"), ("faster_rcnn", "retinanet")])
@pytest.mark.parametrize("method", DETECTION)
def test_unlike_pairs_work_or_are_refused_in_one_line(method, student, teacher):
    try:
        pair = make_pair([method], student, teacher)
    except UserError as error:
        message = str(error)
    else:
        assert take_steps(pair, steps=1)[method].isfinite()
        return
    assert "use" in message or "weight" in message
    assert "\n" not in message


def _without_mask(method):
    return {method: {"mask": {"ratio": 0.0}}} if method == "ima" else method
