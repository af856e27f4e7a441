"""Each family learns eight photographs by heart: what no test of its parts can show.

A small detector over ImageNet weights, the same images at every step, AP50 on them above 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from detdistill.data.formats.coco import read_coco
from detdistill.data.loading import DetectionDataset, collate
from detdistill.evaluation.coco import coco_ap
from detdistill.models.build import build_model
from detdistill.models.checkpoints.weights import load_backbone, read_state_dict

pytestmark = [pytest.mark.real, pytest.mark.long]

SIZE = (160, 224)
SMALLEST = 48  # pixels in the photograph, about 20 in the network's input


@dataclass(frozen=True)
class Settings:
    """Steps of AdamW over all images at once, and options of the builder."""

    steps: int = 40
    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)


DENSE = {"head_depth": 2, "strides": (8, 16, 32, 64)}
QUERIES = {"head_depth": 2, "neck_width": 0.5, "num_queries": 30, "num_denoising": 30, "freeze_stages": 4}
TWO_STAGE = {"strides": (8, 16, 32, 64), "anchor_scale": 4.0, "roi_samples": 64}
FAMILY_SETTINGS = {
    "retinanet": Settings(options=DENSE),
    "fcos": Settings(options=DENSE),
    "gfl": Settings(steps=60, lr=6e-4, options=DENSE),  # scores follow the boxes, and so come last
    # At first an object has one cell, others follow as first boxes fit it: more steps, each of them cheap.
    "reppoints": Settings(steps=90, options={"head_depth": 1, "strides": (16, 32, 64), "freeze_stages": 5}),
    "faster_rcnn": Settings(steps=25, options=TWO_STAGE),
    "mask_rcnn": Settings(steps=50, options={**TWO_STAGE, "roi_samples": 32}),
    "cascade_rcnn": Settings(steps=30, options=TWO_STAGE),
    "cascade_mask_rcnn": Settings(steps=50, options={**TWO_STAGE, "roi_samples": 16, "freeze_stages": 4}),
    "rtdetr_v2": Settings(steps=70, options=QUERIES),
    "d_fine": Settings(steps=70, options=QUERIES),
}


@pytest.fixture(scope="module")
def photographs(shared_data):
    """The first eight images whose objects are few, and large enough to be seen at this size."""

    def plain(record):
        sides = record.boxes_K4[:, 2:] - record.boxes_K4[:, :2]
        large = len(sides) > 0 and np.sqrt(sides.prod(axis=1)).min() >= SMALLEST
        return large and len(sides) <= 6 and not record.ignore_K.any()

    root = shared_data / "coco-mini"
    split = read_coco(root / "annotations" / "instances_train2017.json", root / "train2017", "train")
    return replace(split, records=tuple(filter(plain, split.records))[:8])


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_eight_photographs_are_learnt_by_heart(family, photographs, shared_data):
    settings = FAMILY_SETTINGS[family]
    torch.manual_seed(0)
    model: Any = build_model(
        family,
        photographs.classes,
        backbone="mobilenetv2_100",
        channels=64,
        norm="frozen",
        size=SIZE,
        **settings.options,
    )
    weights = shared_data / "weights" / "mobilenetv2_100.timm.safetensors"
    load_backbone(model.backbone, read_state_dict(weights))
    dataset = DetectionDataset(photographs, None, with_masks=model.needs_masks)
    images, targets = collate([dataset[i] for i in range(len(photographs))])

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    model.train()
    for _ in range(settings.steps):
        loss = torch.stack(list(model(images, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()

    model.eval()
    with torch.inference_mode():
        found = model(images)
    assert coco_ap(photographs, found).AP50 > 0.9
    if model.needs_masks:
        assert coco_ap(photographs, found, "segm").AP50 > 0.65  # outlines of thin things come last; 0.8 here
