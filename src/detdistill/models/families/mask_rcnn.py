"""Mask R-CNN with a feature pyramid (He et al. 2017): Faster R-CNN that also draws its objects.

The same losses, detections and masks as torchvision's ``MaskRCNN``; a test holds the proof.
"""

from __future__ import annotations

from collections.abc import Sequence

from detdistill.models.families.faster_rcnn import FasterRCNN, RoIHead
from detdistill.models.families.two_stage import build_parts
from detdistill.models.layers.masks import MaskBranch
from detdistill.recipe.models import MaskRCNNConfig


class MaskRCNN(FasterRCNN):
    """A Faster R-CNN with a mask branch; build it with :func:`mask_rcnn`."""

    family = "mask_rcnn"
    needs_masks = True


def build_mask_rcnn(config: MaskRCNNConfig, classes: Sequence[str]) -> MaskRCNN:
    """A Mask R-CNN over any timm backbone; its mask head is as wide as the pyramid."""
    parts = build_parts(config, classes)
    branch = MaskBranch(parts.backbone.channels, config.channels, len(classes), convention=config.convention)
    return MaskRCNN(parts, RoIHead(config.channels, len(classes), convention=config.convention), branch)
