"""RetinaNet: one-stage, anchor-based (Lin et al., "Focal Loss for Dense Object Detection", 2017).

The same losses and detections as torchvision's ``RetinaNet``; a test holds the proof. The convention ``mmdet``
gives MMDetection's detections: P6 is made from C5, P7 without a ReLU, anchors are not rounded to whole pixels,
cells are exactly a stride apart, and no box is less than 16/1000 of its anchor wide or high.

Shape legend: N images, A = 9 anchors a cell, P all anchors of an image, Q classes, K objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import sigmoid_focal_loss

from detdistill.models.base import Batch, DenseOutputs, HeadOutputs, Pyramid
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.backbones import Backbone, FeaturePyramid, split_strides
from detdistill.models.layers.heads import (
    IGNORED,
    DenseHead,
    ExactAnchors,
    box_coder,
    flatten_maps,
    gather_matched_boxes,
    init_head,
    match_boxes,
    one_hot_targets,
)
from detdistill.recipe.models import RetinaNetConfig

WEIGHTS = (1.0, 1.0, 1.0, 1.0)
CODER = BoxCoder(WEIGHTS)
RATIOS = (0.5, 1.0, 2.0)


class RetinaNetHead(DenseHead):
    """Two towers of convolutions, shared by the levels."""

    def __init__(self, channels: int, depth: int, num_anchors: int, num_classes: int) -> None:
        super().__init__(channels, depth, group_norm=False)
        self.cls = nn.Conv2d(channels, num_anchors * num_classes, 3, padding=1)
        self.box = nn.Conv2d(channels, num_anchors * 4, 3, padding=1)
        init_head(self, class_layer=self.cls)

    def outputs(self, cls: Pyramid, box: Pyramid) -> DenseOutputs:
        return DenseOutputs(
            cls={stride: self.cls(x) for stride, x in cls.items()},
            box={stride: self.box(x) for stride, x in box.items()},
        )


class RetinaNet(OneStage):
    """The five steps of RetinaNet; build it with :func:`retinanet`.

    Losses: ``classification`` (focal, α 0.25, γ 2) and ``bbox_regression`` (L1 of the encoded boxes), each
    summed over an image's anchors, divided by its number of matched anchors (at least 1), and averaged over
    the images. The mean over images makes N processes with equal local batches equal to one process.
    """

    family = "retinanet"
    kind = "anchor"

    def losses(self, outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(outputs, DenseOutputs)
        assert batch.targets is not None, "losses need a batch with targets"
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            logits_NPQ = torch.cat(flatten_maps(outputs.cls.values(), len(self.classes)), dim=1)
            deltas_NP4 = torch.cat(flatten_maps(outputs.box.values(), 4), dim=1)
            anchors = self.anchors(outputs.cls, batch)
            anchors_P4 = torch.cat(anchors)
            classification, regression = [], []
            for logits_PQ, deltas_P4, target in zip(logits_NPQ, deltas_NP4, batch.targets, strict=True):
                boxes_K4 = target["boxes"].float()
                matched_P = self.match(boxes_K4, anchors)
                positive_P = matched_P >= 0
                count = positive_P.sum().clamp(min=1)
                wanted_PQ = one_hot_targets(matched_P, target["labels"], len(self.classes))
                focal_PQ = sigmoid_focal_loss(logits_PQ, wanted_PQ)
                classification.append((focal_PQ.sum(dim=1) * (matched_P != IGNORED)).sum() / count)
                wanted_P4 = CODER.encode_single(
                    gather_matched_boxes(matched_P, boxes_K4, anchors_P4), anchors_P4
                )
                l1_P4 = F.l1_loss(deltas_P4, wanted_P4, reduction="none")
                regression.append(torch.where(positive_P[:, None], l1_P4, 0).sum() / count)
        return {
            "classification": torch.stack(classification).mean(),
            "bbox_regression": torch.stack(regression).mean(),
        }

    def match(self, boxes_K4: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        return match_boxes(boxes_K4, torch.cat(list(anchors)), high=0.5, low=0.4, keep_best=True)

    def scores(self, outputs: DenseOutputs) -> list[Tensor]:
        return [logits.sigmoid() for logits in flatten_maps(outputs.cls.values(), len(self.classes))]

    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        coder = box_coder(WEIGHTS, self.convention)
        flat = coder.decode_single(encoded.reshape(-1, 4), anchors.expand_as(encoded).reshape(-1, 4))
        return flat.view_as(encoded)


def build_retinanet(config: RetinaNetConfig, classes: Sequence[str]) -> RetinaNet:
    """A RetinaNet over any timm backbone; ``convention`` decides where torchvision and MMDetection differ."""
    body = Backbone.of(config, split_strides(config.backbone, config.strides))
    sides = [stride * config.anchor_scale for stride in config.strides]
    octave = [2 ** (i / 3) for i in range(3)]
    generator: AnchorGenerator
    if config.convention == "mmdet":
        sizes = tuple(tuple(side * factor for factor in octave) for side in sides)
        generator = ExactAnchors(sizes, (RATIOS,) * len(sizes))
        neck = FeaturePyramid(
            body.channels, config.channels, config.strides, extra="linear", extra_from="backbone"
        )
    else:
        # The two larger sides are cut to whole pixels, as torchvision's anchors are.
        sizes = tuple((side, int(side * octave[1]), int(side * octave[2])) for side in sides)
        generator = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
        neck = FeaturePyramid(body.channels, config.channels, config.strides, extra="conv")
    anchors = generator.num_anchors_per_location()[0]
    head = RetinaNetHead(config.channels, config.head_depth, anchors, len(classes))
    return RetinaNet(config, classes, body, neck, head, generator)
