"""What is special to FGD: presets by kind, the context blocks of both sides, and what they cost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from detdistill.distillation.alignment import resize_like
from detdistill.distillation.methods.fgd import FGDLoss, GlobalContext, focal_masks
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models.base import Batch
from detdistill.recipe.methods import FGDOptions

from .pairs import batch, detector, make_pair, take_steps


@pytest.mark.parametrize(
    ("family", "weights", "tau"),
    [
        ("retinanet", (1e-3, 5e-4, 5e-4, 5e-6), 0.5),
        ("fcos", (1.6e-3, 8e-4, 8e-4, 8e-6), 0.8),
        ("faster_rcnn", (5e-5, 2.5e-5, 5e-5, 5e-7), 0.5),
    ],
)
def test_presets(family, weights, tau):
    loss = make_pair(["fgd"], family).methods["fgd"].loss
    found = (loss.foreground_weight, loss.background_weight, loss.attention_weight, loss.relation_weight)
    assert (found, loss.tau) == (weights, tau)


@pytest.mark.parametrize(("family", "levels"), [("retinanet", 5), ("faster_rcnn", 4)])
def test_two_stage_pairs_leave_out_the_coarsest_of_five_levels(family, levels):
    pair = make_pair(["fgd"], family, strides=(4, 8, 16, 32, 64))
    assert len(pair.methods["fgd"].align.levels) == levels


def test_blocks_of_both_sides_are_apart_and_both_learn():
    pair = make_pair(["fgd"])
    take_steps(pair)  # the first step moves the last layers alone, which start at 0
    parts = dict(pair.methods.named_parameters())
    assert all(parameter.grad.any() for parameter in parts.values())
    for stride in ("8", "16", "32"):
        method = pair.methods["fgd"]
        ours, theirs = method.student_context[stride], method.teacher_context[stride]
        assert not torch.equal(ours.key_C, theirs.key_C)
        assert not torch.equal(ours.transform[-1].weight, theirs.transform[-1].weight)


@pytest.mark.parametrize("preset", FGDOptions.presets)
def test_every_preset_builds(preset):
    make_pair([{"fgd": {"preset": preset}}])


def test_a_block_starts_at_nothing():
    assert not GlobalContext(8)(torch.randn(2, 8)).any()


def test_without_relation_there_are_no_blocks():
    pair = Pair(detector(), detector(seed=1), [{"fgd": {"relation_weight": 0}}])  # of one width: no adapters
    assert not list(pair.methods.parameters())
    assert take_steps(pair, steps=1)["fgd"] > 0


def test_bf16_maps_are_summed_in_float32():
    torch.manual_seed(0)
    student, teacher = (x.bfloat16() for x in torch.randn(2, 2, 8, 16, 16))
    masks = torch.rand(2, 2, 16, 16) / 100
    with torch.autocast("cpu", torch.bfloat16):
        half = FGDLoss()(student, teacher, *masks)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, FGDLoss()(student.float(), teacher.float(), *masks))


def test_channels_last_maps_give_the_same():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 8, 6, 5)
    masks = torch.rand(2, 2, 6, 5)
    values = []
    for layout in (torch.contiguous_format, torch.channels_last):
        s = student.clone(memory_format=layout).requires_grad_()
        block = GlobalContext(8)
        block.load_state_dict({name: torch.ones_like(value) for name, value in block.state_dict().items()})
        block.transform[0].weight.data = torch.arange(32.0).view(4, 8).sin()
        loss = FGDLoss(relation_weight=0.1)(s, teacher, *masks, block, GlobalContext(8))
        loss.backward()
        values.append((loss.detach(), s.grad, block.key_C.grad))
    torch.testing.assert_close(*values)


def test_a_box_counts_the_same_whatever_its_size():
    """1/(h w): an object's weights sum to 1."""
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [16.0, 16.0, 64.0, 56.0]])
    inputs = Batch(torch.zeros(1, 3, 64, 64), [(64, 64)], [(64, 64)], [{"boxes": boxes}])
    foreground, background = focal_masks(inputs, torch.zeros(1, 1, 8, 8))
    assert foreground.sum().item() == pytest.approx(2)
    assert background.sum().item() == pytest.approx(1)
    whole = Batch(
        torch.zeros(1, 3, 64, 64), [(64, 64)], [(64, 64)], [{"boxes": boxes.new_tensor([[0, 0, 64, 64]])}]
    )
    _, background = focal_masks(whole, torch.zeros(1, 1, 8, 8))
    assert not background.any()


def test_tau_must_be_positive():
    with pytest.raises(UserError, match="fgd: tau: input should be greater than 0"):
        make_pair([{"fgd": {"tau": 0.0}}])


def test_teacher_carries_no_gradient():
    teacher = torch.randn(1, 4, 3, 3, requires_grad=True)
    student = torch.randn(1, 4, 3, 3, requires_grad=True)
    FGDLoss()(student, teacher, torch.rand(1, 3, 3), torch.rand(1, 3, 3)).backward()
    assert teacher.grad is None
    assert student.grad.any()


def test_the_pair_is_finite_where_maps_are_constant():
    pair = make_pair(["fgd"]).train()
    pair(*batch(constant=True, empty=True))["fgd"].backward()
    assert all(p.grad.isfinite().all() for p in pair.methods.parameters())


def test_unit_on_the_sums_is_unit_on_the_maps():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 4, 5, 6, dtype=torch.float64).mul(30).unbind()
    foreground, background = torch.rand(2, 5, 6), torch.rand(2, 5, 6)
    loss, blocks = FGDLoss(relation_weight=0.1), [GlobalContext(4).double() for _ in range(2)]
    for block in blocks:
        torch.nn.init.normal_(block.transform[-1].weight)
    scale = teacher.square().mean().sqrt()
    found = []
    for on_maps, unit in ((1 / scale, False), (1.0, True)):
        s = student.clone().requires_grad_()
        value = loss(s * on_maps, teacher * on_maps, foreground, background, *blocks, unit)
        found.append((value, *torch.autograd.grad(value, [s, *(block.key_C for block in blocks)])))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)
        assert first.any()


def test_unit_makes_the_scale_of_both_no_matter():
    pair = make_pair(["fgd"])
    images, targets = batch()
    inputs = pair.student.preprocess(images, targets)
    maps = {
        stride: (torch.randn(2, 16, n, n), torch.randn(2, 24, n, n)) for stride, n in ((8, 8), (16, 4), (32, 2))
    }
    method = pair.methods["fgd"]
    for adapter in method.align.adapters.values():
        torch.nn.init.zeros_(adapter.bias)  # an affine map is no scale

    def value(scale):
        return method(
            SimpleNamespace(
                student={stride: scale * s for stride, (s, _) in maps.items()},
                teacher={stride: scale * t for stride, (_, t) in maps.items()},
                alignment=resize_like, teacher_batch=inputs,
            )
        )  # fmt: skip

    torch.testing.assert_close(value(50.0), value(1.0))
    method.unit = False
    assert value(50.0) > 100 * value(1.0)
