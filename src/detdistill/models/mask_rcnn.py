"""Mask R-CNN with a feature pyramid (He et al. 2017): Faster R-CNN that also draws its objects.

The same losses, detections and masks as torchvision's ``MaskRCNN``; a test holds the proof.
"""

from __future__ import annotations

from collections.abc import Sequence

from detdistill.config import Convention
from detdistill.models.base import Preprocess, class_names
from detdistill.models.faster_rcnn import FasterRCNN, RoIHead
from detdistill.models.masks import MaskBranch
from detdistill.models.two_stage import build_parts


class MaskRCNN(FasterRCNN):
    """A Faster R-CNN with a mask branch; build it with :func:`mask_rcnn`."""

    family = "mask_rcnn"
    needs_masks = True


def mask_rcnn(
    backbone: str = "resnet50",
    num_classes: int = 80,
    *,
    classes: Sequence[str] | None = None,
    channels: int = 256,
    strides: Sequence[int] = (4, 8, 16, 32, 64),
    head_depth: int = 1,
    anchor_scale: float = 8.0,
    convention: Convention = "torchvision",
    norm: str = "batch",
    freeze_stages: int = 0,
    stride_in_1x1: bool = False,
    pretrained_backbone: bool = False,
    preprocess: Preprocess | None = None,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    rpn_samples: int = 256,
    roi_samples: int = 512,
) -> MaskRCNN:
    """A Mask R-CNN over any timm backbone; the defaults are torchvision's ``maskrcnn_resnet50_fpn``.

    It learns from targets with ``masks``, and its detections have ``masks``, too.

    Args:
        channels: width of the pyramid and of the mask head; the RoI head's linear layers are four times wider.
        backbone, num_classes, classes, strides, head_depth, anchor_scale, convention, norm,
            freeze_stages, stride_in_1x1, pretrained_backbone, preprocess, score_threshold, nms_threshold,
            max_detections, rpn_samples,
            roi_samples: as of :func:`~detdistill.models.faster_rcnn.faster_rcnn`.

    Raises:
        UserError: as :class:`~detdistill.models.backbones.Backbone` does.
    """
    names = class_names(classes, num_classes)
    parts = build_parts(
        backbone,
        names,
        channels=channels,
        strides=strides,
        head_depth=head_depth,
        anchor_scale=anchor_scale,
        convention=convention,
        norm=norm,
        freeze_stages=freeze_stages,
        stride_in_1x1=stride_in_1x1,
        pretrained_backbone=pretrained_backbone,
        preprocess=preprocess,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        max_detections=max_detections,
        rpn_samples=rpn_samples,
        roi_samples=roi_samples,
    )
    branch = MaskBranch(parts.backbone.channels, channels, len(names), convention=convention)
    return MaskRCNN(parts, RoIHead(channels, len(names), convention=convention), branch)
