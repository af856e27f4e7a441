"""Parameters and multiply-adds of the published networks, at 1280×800.

Sources, both counted by MMDetection's ``get_flops.py`` (1,000 proposals, masks of 100): RetinaNet R50 from its
documentation (useful tools, model complexity); the two-stage families from its README of Res2Net (comparison).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from detdistill.models import build_model

CLASSES = 80
MASKS = 100
# That counter takes a transposed convolution to work on each of its four times as many outputs.
UPSAMPLING = 3 * MASKS * (2 * 2 * 256 * 256) * 14 * 14

PUBLISHED = [
    ("retinanet", "resnet50", {"convention": "mmdet"}, 37.74, 239.32),
    ("faster_rcnn", "resnet101", {}, 60.52, 283.14),
    ("faster_rcnn", "resnext101_64x4d", {}, 99.25, 440.36),
    ("mask_rcnn", "resnet101", {}, 63.17, 351.65),
    ("mask_rcnn", "resnext101_64x4d", {}, 101.9, 508.87),
    ("cascade_rcnn", "resnet101", {}, 88.16, 310.78),
    ("cascade_rcnn", "resnext101_64x4d", {}, 126.89, 468.00),
    ("cascade_mask_rcnn", "resnet101", {}, 96.09, 516.30),
    ("cascade_mask_rcnn", "resnext101_64x4d", {}, 134.82, 673.52),
]


def costs(model: Any) -> float:
    """Multiply-adds of the convolutions and matrix products for one image; nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        pyramid = model.neck(model.backbone(torch.empty(1, 3, 800, 1280)))
        if not hasattr(model, "rpn"):
            model.head(pyramid)
            return counter.get_total_flops() / 2
        model.rpn(pyramid)
        for head in (model.roi_head, *getattr(model, "later_heads", ())):
            head(torch.empty(1000, 256, 7, 7))
        heads = () if model.mask_branch is None else model.mask_branch.heads
        for head in heads:
            head(torch.empty(MASKS, 256, 14, 14))
    return counter.get_total_flops() / 2 + UPSAMPLING * len(heads)


@pytest.mark.parametrize(("family", "backbone", "options", "millions", "billions"), PUBLISHED)
def test_costs_are_the_published_ones(
    family: str, backbone: str, options: Any, millions: float, billions: float
) -> None:
    with torch.device("meta"):
        model: Any = build_model(family, CLASSES, backbone=backbone, **options).eval()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)
    assert costs(model) == pytest.approx(billions * 1e9, rel=0.01)
