"""What is special about COFD: margins, connectors, the partial distance, and the weights of the levels."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detdistill.distillation.alignment import resize_like
from detdistill.distillation.methods.cofd import COFDLoss, Connector, Margin, batch_norm_margin
from detdistill.distillation.pair import Pair

from .pairs import batch, detector, make_pair, snapshot, take_steps


def test_measured_margin_starts_with_the_first_batch_and_runs_on():
    margin = Margin(2).train()
    first = torch.tensor([[-1.0, -3.0, 5.0], [1.0, 2.0, 3.0]])[None, :, :, None]
    torch.testing.assert_close(margin(first), torch.tensor([-2.0, 0.0]))  # nothing negative: stays at 0
    second = torch.tensor([[-4.0, 1.0, 1.0], [1.0, -6.0, 3.0]])[None, :, :, None]
    # a tenth of the way; the second channel's first negative value sets it
    torch.testing.assert_close(margin(second), torch.tensor([-2.2, -6.0]))
    torch.testing.assert_close(margin(first.abs()), torch.tensor([-2.2, -6.0]))


def test_measured_margin_rests_in_evaluation():
    margin = Margin(1).train()
    margin(torch.full((1, 1, 2, 2), -1.0))
    margin.eval()
    assert margin(torch.full((1, 1, 2, 2), -9.0)).item() == -1.0


def test_margins_are_saved_with_the_pair():
    pair = make_pair(["cofd"])
    take_steps(pair, steps=1)
    state = pair.state_dict()
    for stride in (8, 16, 32):
        saved = state[f"terms.cofd.method.margins.{stride}.margin"]
        assert (saved < 0).any()
        assert saved.shape == (24,)


def normed_teacher():
    """A teacher whose levels come out of a BatchNorm, as a pyramid with norms has."""
    teacher = detector(channels=24, seed=1)
    teacher.norms = nn.ModuleDict({str(stride): nn.BatchNorm2d(24) for stride in teacher.pyramid_channels})
    for norm in teacher.norms.values():
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.5)
    teacher.pyramid_norms = {int(stride): norm for stride, norm in teacher.norms.items()}
    plain = teacher.forward_features
    teacher.forward_features = lambda inputs: {s: teacher.pyramid_norms[s](x) for s, x in plain(inputs).items()}
    return teacher


def test_margin_in_closed_form_where_a_batch_norm_feeds_the_level():
    teacher = normed_teacher()
    pair = Pair(detector(), teacher, ["cofd"])
    margins = pair.methods["cofd"].margins
    before = snapshot(margins)
    for stride, norm in teacher.pyramid_norms.items():
        torch.testing.assert_close(margins[str(stride)].margin, batch_norm_margin(norm.weight, norm.bias))
        assert not margins[str(stride)].margin.requires_grad
    take_steps(pair)
    assert all(torch.equal(before[name], value) for name, value in snapshot(margins).items())
    assert not any("norms" in name for name in pair.state_dict())  # the teacher's modules are not the pair's


def test_detectors_without_norms_say_so():
    assert dict(detector().pyramid_norms) == {}
    assert dict(copy.deepcopy(detector()).pyramid_norms) == {}


@pytest.mark.parametrize(
    ("student", "teacher", "slope"),
    [
        (-3.0, -0.5, 0.0),  # below a negative target: enough
        (-0.2, -0.5, 0.6),  # above it: pushed down to the target
        (-3.0, 2.0, -10.0),  # a positive target is met from below too
        (-0.9, -5.0, 0.2),  # the margin, not the teacher, is the floor
    ],
)
def test_partial_distance(student, teacher, slope):
    x = torch.full((1, 1, 1, 1), student, requires_grad=True)
    COFDLoss(alpha=1.0)(x, torch.full((1, 1, 1, 1), teacher), torch.tensor([-1.0])).backward()
    assert x.grad.item() == pytest.approx(slope)


def test_each_level_counts_twice_the_next_finer_one():
    pair = make_pair(["cofd"]).eval()
    pair.student.training = True
    cofd = pair.methods["cofd"]
    images, targets = batch()
    value = pair(images, targets)["cofd"]
    with torch.no_grad():
        inputs = pair.student.preprocess(images)
        student, teacher = pair.student.forward_features(inputs), pair.teacher.forward_features(inputs)
        step = SimpleNamespace(student=student, teacher=teacher, alignment=resize_like)
        terms = [cofd.loss(s, t, torch.zeros(24)) for _, s, t in cofd.align(step)]
    torch.testing.assert_close(value.detach(), terms[0] / 4 + terms[1] / 2 + terms[2])


def test_connectors_stand_even_between_equal_channels_unless_told():
    teacher = detector(seed=1)
    always = Pair(detector(), teacher, ["cofd"]).methods["cofd"].align.adapters
    assert len(always) == 3
    assert all(module.conv.bias is None for module in always.values())
    assert not Pair(detector(), teacher, [{"cofd": {"adapt": "auto"}}]).methods["cofd"].align.adapters


def test_without_connectors_an_equal_student_has_nothing_to_learn():
    teacher = detector(seed=1)
    pair = Pair(copy.deepcopy(teacher), teacher, [{"cofd": {"adapt": "auto"}}]).eval()
    pair.student.training = True
    assert pair(*batch())["cofd"].item() == 0


def test_a_connector_takes_a_single_value():
    connector = Connector(3, 5).train()
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    connector(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in connector.parameters())
    assert connector.norm.num_batches_tracked == 0
    assert connector(torch.randn(1, 3, 2, 1)).shape == (1, 5, 2, 1)


def test_the_weight_of_cifar_is_a_preset():
    assert make_pair(["cofd"]).methods["cofd"].loss.alpha == 1e-4
    assert make_pair([{"cofd": {"preset": "cifar"}}]).methods["cofd"].loss.alpha == 1e-3
