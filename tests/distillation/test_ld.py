"""LD: where it acts, on what heads, and what it adds up."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from detdistill.distillation.methods.ld import LDLoss, valuable_region
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models.layers.heads import gather_matched_boxes
from detdistill.recipe.methods import LDOptions

from .pairs import batch, detector, gfl_detector, gfl_pair, make_pair, take_steps

ANCHORS = [
    torch.tensor([[x, y, x + 24.0, y + 24] for y in range(0, 64, 8) for x in range(0, 64, 8)]),
    torch.tensor([[x, y, x + 48.0, y + 48] for y in range(0, 64, 16) for x in range(0, 64, 16)]),
]


def by_hand(boxes, levels, alpha, topk):
    """The region by the definition, an object and an anchor after the other."""
    anchors, weight = np.concatenate(levels), np.zeros(sum(map(len, levels)))
    for box in boxes:
        ious, dious, candidates, start = [], [], [], 0
        for anchor in anchors:
            sides = np.maximum(0, np.minimum(box[2:], anchor[2:]) - np.maximum(box[:2], anchor[:2]))
            union = (box[2:] - box[:2]).prod() + (anchor[2:] - anchor[:2]).prod() - sides.prod()
            hull = np.maximum(box[2:], anchor[2:]) - np.minimum(box[:2], anchor[:2])
            offset = (box[:2] + box[2:] - anchor[:2] - anchor[2:]) / 2
            ious.append(sides.prod() / union)
            dious.append(ious[-1] - (offset**2).sum() / (hull**2).sum())
        for level in levels:
            far = [np.linalg.norm(box[:2] + box[2:] - anchor[:2] - anchor[2:]) for anchor in level]
            candidates += [start + i for i in np.argsort(far)[:topk]]
            start += len(level)
        near = [ious[i] for i in candidates]
        threshold = np.mean(near) + np.std(near, ddof=1)
        for i, diou in enumerate(dious):
            if alpha * threshold <= diou < threshold:
                weight[i] = max(weight[i], ious[i])
    return weight


@pytest.mark.parametrize("alpha", [0.25, 0.6])
def test_region_is_what_nearly_answers_for_an_object(alpha):
    # Off the grid, so that no two anchors are equally far.
    boxes = torch.tensor([[5.3, 8.1, 36.7, 33.9], [30.2, 11.4, 59.9, 60.3]])
    wanted = by_hand(boxes.numpy(), [level.numpy() for level in ANCHORS], alpha, topk=9)
    got = valuable_region(boxes, ANCHORS, alpha)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4)
    assert 0 < (wanted > 0).sum() < len(wanted)


def test_region_without_objects_is_empty():
    assert valuable_region(torch.zeros(0, 4), ANCHORS).abs().sum() == 0


def test_it_trains_and_an_equal_student_has_nothing_to_learn():
    losses = take_steps(gfl_pair(["ld"]))
    assert losses["ld"].item() > 0
    teacher = gfl_detector(seed=1)
    pair = Pair(copy.deepcopy(teacher), teacher, ["ld"]).eval()
    assert pair(*batch())["ld"].abs().item() < 1e-5


@pytest.mark.parametrize("preset", ["anchor", "anchor_free"])
def test_finite_in_half_precision_and_zero_without_objects(preset):
    pair = gfl_pair([{"ld": {"preset": preset}}]).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = pair(*batch())
    losses["ld"].backward()
    assert losses["ld"].item() > 0
    assert all(p.grad.isfinite().all() for p in pair.student.parameters() if p.grad is not None)
    empty = pair(*batch(empty=True))["ld"]
    empty.backward()
    assert empty.item() == 0


class Recorder(LDLoss):
    def forward(self, *args):
        self.seen = [*getattr(self, "seen", []), args]
        return super().forward(*args)


def test_positive_anchors_are_the_students_own_and_inside_excludes_them():
    pair = gfl_pair([{"ld": {"region": "inside"}}])
    pair.methods["ld"].loss = Recorder()
    images, targets = batch(n=1)
    pair(images, targets)
    positive, weight = (torch.cat([args[i] for args in pair.methods["ld"].loss.seen], dim=1)[0] for i in (4, 5))
    inputs = pair.student.preprocess(images, targets)
    anchors = pair.student.anchors(pair.student.forward_features(inputs), inputs)
    matched = pair.student.match(targets[0]["boxes"], anchors)
    assert positive.tolist() == (matched >= 0).tolist()
    assert positive.any()
    point = gather_matched_boxes(torch.full_like(matched, -1), torch.zeros(0, 4), torch.cat(anchors))
    x, y = (point[:, 0] + point[:, 2]) / 2, (point[:, 1] + point[:, 3]) / 2
    inside = torch.zeros_like(positive)
    for left, top, right, bottom in targets[0]["boxes"]:
        inside |= (x > left) & (x < right) & (y > top) & (y < bottom)
    assert (weight > 0).tolist() == (inside & ~positive).tolist()
    assert (weight > 0).any()


def test_localization_does_not_grow_with_the_batch():
    pair = gfl_pair([{"ld": {"kd_weight": 0}}]).eval()
    images, targets = batch(n=1)
    once, twice = pair(images, targets)["ld"], pair(images * 2, targets * 2)["ld"]
    assert twice.item() == pytest.approx(once.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("family", "instead"), [("fcos", "kd or crosskd"), ("retinanet", "kd or crosskd"), ("faster_rcnn", "ima")]
)
def test_heads_without_distributions_are_told_what_to_use(family, instead):
    with pytest.raises(UserError, match=rf"use a family with a distributional head .* {instead}"):
        make_pair(["ld"], family)


def test_other_pairs_that_are_refused():
    with pytest.raises(UserError, match="the student's 5 with the teacher's 17"):
        gfl_pair(["ld"], bins=5)
    with pytest.raises(UserError, match="FCOS predicts none"):
        Pair(gfl_detector(), detector("fcos", 24), ["ld"])
    with pytest.raises(UserError, match="ld: alpha: input should be"):
        gfl_pair([{"ld": {"alpha": 1.5}}])
    with pytest.raises(UserError, match=r"ld: .*temperature: input should be greater than 0"):
        gfl_pair([{"ld": {"temperature": 0.0}}])


def test_the_kind_chooses_the_region():
    assert LDOptions.presets["anchor_free"] == {"region": "inside"}
    assert gfl_pair(["ld"]).methods["ld"].region == "vlr"
