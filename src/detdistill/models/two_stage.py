"""What two-stage detectors have in common: all but their RoI heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from detdistill.config import Convention
from detdistill.models.backbones import Backbone, FeaturePyramid, split_strides
from detdistill.models.base import DenseRaw, Preprocess, Pyramid
from detdistill.models.heads import ExactAnchors, check_convention, init_head, tower

RATIOS = (0.5, 1.0, 2.0)


class RPNHead(nn.Module):
    """Objectness and box deltas of every anchor, shared by the levels."""

    def __init__(self, channels: int, depth: int, num_anchors: int) -> None:
        super().__init__()
        self.tower = tower(channels, depth, group_norm=False)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.box = nn.Conv2d(channels, num_anchors * 4, 1)
        init_head(self)

    def forward(self, pyramid: Pyramid) -> DenseRaw:
        features = {stride: self.tower(x) for stride, x in pyramid.items()}
        return DenseRaw(
            cls={stride: self.objectness(x) for stride, x in features.items()},
            box={stride: self.box(x) for stride, x in features.items()},
        )


@dataclass(slots=True)
class TwoStageParts:
    """What the two-stage detectors have in common; :func:`build_parts` makes it."""

    backbone: Backbone
    neck: FeaturePyramid
    rpn: RPNHead
    anchor_generator: AnchorGenerator
    convention: Convention
    classes: tuple[str, ...]
    preprocess: Preprocess
    score_threshold: float
    nms_threshold: float
    max_detections: int
    rpn_samples: int
    roi_samples: int


def build_parts(
    backbone: str,
    classes: Sequence[str],
    *,
    channels: int,
    strides: Sequence[int],
    head_depth: int,
    anchor_scale: float,
    convention: Convention,
    norm: str,
    freeze_stages: int,
    stride_in_1x1: bool,
    pretrained_backbone: bool,
    preprocess: Preprocess | None,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
    rpn_samples: int,
    roi_samples: int,
) -> TwoStageParts:
    """Arguments are those of :func:`~detdistill.models.faster_rcnn.faster_rcnn`."""
    check_convention("a two-stage detector", convention, ("torchvision", "mmdet"))
    body = Backbone(
        backbone, split_strides(backbone, strides),
        pretrained=pretrained_backbone, norm=norm, freeze_stages=freeze_stages, stride_in_1x1=stride_in_1x1,
    )  # fmt: skip
    sizes = tuple((stride * anchor_scale,) for stride in strides)
    return TwoStageParts(
        body,
        FeaturePyramid(body.channels, channels, strides, extra="pool"),
        RPNHead(channels, head_depth, len(RATIOS)),
        (AnchorGenerator if convention == "torchvision" else ExactAnchors)(sizes, (RATIOS,) * len(sizes)),
        convention,
        tuple(classes),
        preprocess or Preprocess(mean=body.mean, std=body.std),
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        max_detections=max_detections,
        rpn_samples=rpn_samples,
        roi_samples=roi_samples,
    )
