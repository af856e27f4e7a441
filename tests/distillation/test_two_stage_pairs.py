"""Mask and Cascade R-CNN as teachers of other two-stage students, and as students with masks of their own."""

from __future__ import annotations

import pytest
import torch

from detdistill.distillation.pair import Pair

from .pairs import batch, detector, with_head

FEATURES = ("ima", "mimic", "pkd", "fgd", "mgd")


def with_masks(images, targets):
    for image, target in zip(images, targets, strict=True):
        masks = torch.zeros(len(target["boxes"]), *image.shape[-2:], dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, target["boxes"].long().tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        target["masks"] = masks
    return images, targets


@pytest.mark.parametrize("method", FEATURES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("faster_rcnn", "cascade_rcnn"), ("faster_rcnn", "mask_rcnn"), ("faster_rcnn", "cascade_mask_rcnn"),
        ("mask_rcnn", "cascade_mask_rcnn"), ("cascade_rcnn", "mask_rcnn"), ("fcos", "cascade_rcnn"),
    ],
)  # fmt: skip
def test_features_are_taught_across_two_stage_families(student, teacher, method):
    pair = Pair(detector(student), detector(teacher, channels=24, seed=1), [method]).train()
    losses = pair(*with_masks(*batch()))
    assert losses[method] > 0
    own = {name for name in losses if name != method}
    torch.manual_seed(0)
    alone = pair.student.train()(*with_masks(*batch()))
    assert own == set(alone)
    pair.zero_grad()
    losses[method].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in pair.student.backbone.parameters())


@pytest.mark.parametrize("method", ["kd", "dist", "defeat", "scalekd"])
@pytest.mark.parametrize("family", ["mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"])
def test_responses_of_the_first_head_are_taught_within_a_family(family, method):
    pair = Pair(detector(family), detector(family, channels=24, seed=1), [with_head(method)]).train()
    losses = pair(*with_masks(*batch()))
    assert losses[method].isfinite()
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in pair.parameters())
    assert pair.student.roi_head.cls.weight.grad.abs().sum() > 0


def test_a_teacher_with_masks_needs_none_in_the_targets():
    pair = Pair(detector("faster_rcnn"), detector("cascade_mask_rcnn", channels=24, seed=1), ["ima"]).train()
    assert pair(*batch())["ima"] > 0
