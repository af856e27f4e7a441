"""The parts of two-stage detectors: the proposals' network, RoI heads, and how proposals are chosen.

Shape legend: N images, P anchors, M proposals of a level, R proposals, Q classes, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import nms

from detdistill.models.base import DenseOutputs, Pyramid
from detdistill.models.layers.backbones import Backbone, FeaturePyramid, split_strides
from detdistill.models.layers.heads import (
    ExactAnchors,
    box_coder,
    clip_to_image,
    flatten_maps,
    init_head,
    tower,
)
from detdistill.recipe.models import Convention, TwoStageConfig

RATIOS = (0.5, 1.0, 2.0)
RPN_NMS_THRESHOLD = 0.7
POOLED = 7  # cells of a pooled region
LEAST_PROPOSAL = 1e-3  # pixels of network input: smaller boxes are no proposals


class RPNHead(nn.Module):
    """Objectness and box deltas of every anchor, shared by the levels."""

    def __init__(self, channels: int, depth: int, num_anchors: int) -> None:
        super().__init__()
        self.tower = tower(channels, depth, group_norm=False)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.box = nn.Conv2d(channels, num_anchors * 4, 1)
        init_head(self)

    def forward(self, pyramid: Pyramid) -> DenseOutputs:
        features = {stride: self.tower(x) for stride, x in pyramid.items()}
        return DenseOutputs(
            cls={stride: self.objectness(x) for stride, x in features.items()},
            box={stride: self.box(x) for stride, x in features.items()},
        )


class RoIHead(nn.Module):
    """Two linear layers over the pooled region, then Q + 1 classes and a box for each.

    Args:
        channels: of the pyramid.
        num_classes: without the background.
        iou: a proposal answers for the object that it overlaps by so much, else for the background.
        box_stds: what the four box deltas are divided by.
        class_agnostic: one box for all classes; it is given out Q + 1 times.
        convention: whose way boxes are encoded in.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        iou: float = 0.5,
        box_stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2),
        class_agnostic: bool = False,
        convention: Convention = "torchvision",
    ) -> None:
        super().__init__()
        width = 4 * channels  # 1024 at 256 channels; a narrow pyramid gets a head in proportion
        self.fc6 = nn.Linear(channels * POOLED**2, width)
        self.fc7 = nn.Linear(width, width)
        self.cls = nn.Linear(width, num_classes + 1)
        self.box = nn.Linear(width, 4 if class_agnostic else 4 * (num_classes + 1))
        self.iou = iou
        x, y, w, h = box_stds
        self.coder = box_coder((1 / x, 1 / y, 1 / w, 1 / h), convention)
        self.class_agnostic = class_agnostic

    def forward(self, pooled_RC77: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fc7(F.relu(self.fc6(pooled_RC77.flatten(1)))))
        logits_RQ, deltas = self.cls(x), self.box(x)
        return logits_RQ, deltas.repeat(1, logits_RQ.shape[1]) if self.class_agnostic else deltas


@dataclass(slots=True)
class TwoStageParts:
    """What the two-stage detectors have in common; :func:`build_parts` makes it."""

    config: TwoStageConfig
    classes: tuple[str, ...]
    backbone: Backbone
    neck: FeaturePyramid
    rpn: RPNHead
    anchor_generator: AnchorGenerator


def build_parts(config: TwoStageConfig, classes: Sequence[str]) -> TwoStageParts:
    """Backbone, neck and proposals' network of a section.

    Regions are pooled from the levels that the backbone has; the levels beyond take every second cell.
    """
    body = Backbone.of(config, split_strides(config.backbone, config.strides))
    sizes = tuple((stride * config.anchor_scale,) for stride in config.strides)
    anchors = AnchorGenerator if config.convention == "torchvision" else ExactAnchors
    return TwoStageParts(
        config,
        tuple(classes),
        body,
        FeaturePyramid(body.channels, config.channels, config.strides, extra="pool"),
        RPNHead(config.channels, config.head_depth, len(RATIOS)),
        anchors(sizes, (RATIOS,) * len(sizes)),
    )


def best_anchors(
    rpn: DenseOutputs, anchors: Sequence[Tensor], coder: BoxCoder, limit: int
) -> list[tuple[Tensor, Tensor]]:
    """Of each level the best anchors' boxes (N, M, 4), not clipped, and their scores (N, M), falling."""
    found = []
    maps = zip(flatten_maps(rpn.cls.values(), 1), flatten_maps(rpn.box.values(), 4), anchors, strict=True)
    for logits_NP1, deltas_NP4, anchors_P4 in maps:
        top_NM, at_NM = logits_NP1.squeeze(2).topk(min(limit, len(anchors_P4)), dim=1)
        deltas_NM4 = deltas_NP4.gather(1, at_NM[..., None].expand(-1, -1, 4))
        decoded = coder.decode_single(deltas_NM4.flatten(0, 1), anchors_P4[at_NM].flatten(0, 1))
        found.append((decoded.view_as(deltas_NM4), top_NM.sigmoid()))
    return found


def suppress_proposals(
    boxes_1M4: Tensor, scores_1M: Tensor, size: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """A level's proposals of one image, clipped, and their scores: -1 of those that others suppress."""
    boxes_M4, scores_M = clip_to_image(boxes_1M4[0], size), scores_1M[0]
    solid_M = (boxes_M4[:, 2:] - boxes_M4[:, :2] >= LEAST_PROPOSAL).all(dim=1)
    # Boxes of no size suppress nothing, and come last.
    scores_M = torch.where(solid_M, scores_M, -1.0)
    kept = nms(boxes_M4, scores_M, RPN_NMS_THRESHOLD)
    kept_M = torch.zeros_like(solid_M).scatter(0, kept, torch.ones_like(kept, dtype=torch.bool)) & solid_M
    return boxes_M4, torch.where(kept_M, scores_M, -1.0)
