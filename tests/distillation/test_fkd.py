from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods.fkd import FKDLoss, NonLocal
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError

from .pairs import batch, detector, make_pair


def fkd(maps, **options):
    others = {name: x for name, x in maps.items() if name not in ("student_NCHW", "teacher_NCHW")}
    return FKDLoss(**options)(maps["student_NCHW"], maps["teacher_NCHW"], **others)


def inputs(images=2):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "student_NCHW": (images, 4, 3, 5),
        "teacher_NCHW": (images, 4, 3, 5),
        "adapted_NCHW": (images, 4, 3, 5),
        "channels_NC": (images, 4),
        "pixels_N1HW": (images, 1, 3, 5),
        "student_relation_NCHW": (images, 4, 3, 5),
        "teacher_relation_NCHW": (images, 4, 3, 5),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("reduction", ["paper", "mean"])
def test_gradient_of_a_perfect_student_is_zero_not_infinite(reduction):
    maps = inputs()
    teacher = maps["teacher_NCHW"]
    maps["adapted_NCHW"] = teacher.clone().requires_grad_()
    maps["channels_NC"] = teacher.mean(dim=(2, 3)).requires_grad_()
    maps["pixels_N1HW"] = teacher.mean(dim=1, keepdim=True).requires_grad_()
    maps["student_relation_NCHW"] = maps["teacher_relation_NCHW"].clone().requires_grad_()
    value = fkd(maps, reduction=reduction)
    value.backward()
    assert value.item() == 0
    for name in ("adapted_NCHW", "channels_NC", "pixels_N1HW", "student_relation_NCHW"):
        assert not maps[name].grad.any(), name


def test_the_mask_has_no_gradient():
    maps = inputs()
    maps["student_NCHW"].requires_grad_()
    maps["adapted_NCHW"].requires_grad_()
    fkd(maps).backward()
    assert maps["student_NCHW"].grad is None
    assert maps["adapted_NCHW"].grad.any()


def test_a_norm_grows_with_the_batch_and_a_mean_does_not():
    one = inputs(1)
    four = {name: x.repeat(4, *[1] * (x.ndim - 1)) for name, x in one.items()}
    assert (fkd(four) / fkd(one)).item() == pytest.approx(2)
    assert (fkd(four, reduction="mean") / fkd(one, reduction="mean")).item() == pytest.approx(1)


def test_presets_are_the_two_public_variants():
    one_stage = make_pair(["fkd"]).methods["fkd"].loss
    assert (one_stage.feature_weight, one_stage.channel_mask) == (4.2e-4, True)
    assert (one_stage.pooled_weight, one_stage.relation_weight) == (2.4e-2, 4.2e-4)
    assert one_stage.tau == 0.1
    two_stage = make_pair(["fkd"], "faster_rcnn").methods["fkd"].loss
    assert (two_stage.feature_weight, two_stage.channel_mask) == (7e-5, False)
    assert (two_stage.pooled_weight, two_stage.relation_weight) == (4e-3, 7e-5)
    assert two_stage.tau == 0.5
    assert make_pair([{"fkd": {"preset": "mean"}}]).methods["fkd"].loss.reduction == "mean"


def test_keys_are_pooled_by_8_4_2_2_2_from_the_finest_level():
    pair = make_pair(["fkd"], "faster_rcnn", strides=(4, 8, 16, 32, 64))
    parts = list(pair.methods["fkd"].parts.values())
    assert [part.student_relation.pool for part in parts] == [8, 4, 2, 2, 2]
    assert [part.teacher_relation.pool for part in parts] == [8, 4, 2, 2, 2]
    # 24 channels of the teacher: a quarter of them on the two finest levels, half of them on the others
    assert [part.teacher_relation.query.out_channels for part in parts] == [6, 6, 12, 12, 12]


def test_without_relations_there_are_no_blocks():
    pair = make_pair([{"fkd": {"relation_weight": 0}}])
    assert not [name for name, _ in pair.methods.named_parameters() if "relation" in name]
    assert pair.train()(*batch())["fkd"].isfinite()


def test_levels_of_other_strides_and_sizes():
    pair = Pair(detector(strides=(8, 16)), detector(channels=24, seed=1, strides=(32, 64)), ["fkd"])
    pair.train()(*batch())["fkd"].backward()
    assert all(p.grad is not None for p in pair.methods.parameters())


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (8, 8)])
def test_keys_are_pooled_on_any_map(size):
    assert NonLocal(6, reduction=4, pool=8)(torch.randn(2, 6, *size)).shape == (2, 6, *size)


def test_tau_must_be_positive():
    with pytest.raises(UserError, match="tau"):
        make_pair([{"fkd": {"tau": 0}}])
