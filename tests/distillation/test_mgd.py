"""What is special to MGD: one random mask for all channels, and a generator for each level."""

from __future__ import annotations

import pytest
import torch

from detdistill.distillation.methods.mgd import MGDLoss, random_mask
from detdistill.errors import UserError

from .pairs import batch, make_pair


def test_the_mask_is_one_for_all_channels_and_of_its_ratio():
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(torch.zeros(4, 7, 60, 50, dtype=torch.float64), 0.65, generator)
    assert mask.shape == (4, 1, 60, 50)
    assert mask.dtype == torch.float64
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert 1 - mask.mean().item() == pytest.approx(0.65, abs=0.02)
    assert not torch.equal(mask[0], mask[1])
    assert random_mask(torch.zeros(2, 3, 4, 5), 0.0).all()


def test_masks_are_drawn_anew_and_repeat_with_the_step():
    pair = make_pair(["mgd"]).eval()
    values = []
    for step in (3, 4, 3):
        pair.at_step(step, 10)
        values.append(pair(*batch())["mgd"].item())
    assert values[0] == values[2] != values[1]


@pytest.mark.parametrize(
    ("family", "alpha", "ratio"), [("retinanet", 2e-5, 0.65), ("fcos", 2e-5, 0.65), ("faster_rcnn", 5e-7, 0.45)]
)
def test_presets(family, alpha, ratio):
    method = make_pair(["mgd"], family).methods["mgd"]
    assert (method.loss.alpha, method.mask_ratio) == (alpha, ratio)


def test_a_two_stage_students_four_finest_levels_are_used():
    method = make_pair(["mgd"], "faster_rcnn", strides=(4, 8, 16, 32, 64)).methods["mgd"]
    assert list(method.generators) == ["4", "8", "16", "32"]


def test_generators_have_the_teachers_width():
    method = make_pair(["mgd"]).methods["mgd"]
    assert list(method.generators) == ["8", "16", "32"]
    weights = [p.shape for p in method.generators["8"].parameters() if p.ndim == 4]
    assert weights == [(24, 24, 3, 3)] * 2


def test_the_sum_is_over_the_map_and_the_mean_over_images():
    student, teacher = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    assert MGDLoss(alpha=1.0)(student, teacher) == 60
    wider = [torch.cat([x, x], dim=3) for x in (student, teacher)]
    assert MGDLoss(alpha=1.0)(*wider) == 120


def test_a_ratio_out_of_range_is_refused():
    with pytest.raises(UserError, match="mgd: mask_ratio: input should be less than 1"):
        make_pair([{"mgd": {"mask_ratio": 1.0}}])
