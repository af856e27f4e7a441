"""Cascade R-CNN (Cai and Vasconcelos 2018, 2019): each RoI head refines the boxes of the one before it.

A head of a higher IoU threshold needs better proposals, and gets them from the head before it, in training as
afterwards: three heads with the thresholds 0.5, 0.6 and 0.7, each with one box for all classes. A detection's
scores are the mean of the three heads' (with the convention ``mmdet`` those of the mean logits), its box is the
last one's, its mask the mean of three mask heads'.
Shape legend: R proposals, Q classes, K objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import remove_small_boxes

from detdistill.models.base import Batch, DenseOutputs, HeadOutputs, Pyramid, TwoStageOutputs
from detdistill.models.families.faster_rcnn import FasterRCNN, RoIHead, roi_losses
from detdistill.models.families.two_stage import TwoStageParts, build_parts
from detdistill.models.layers.heads import clip_to_image
from detdistill.models.layers.masks import MaskBranch
from detdistill.recipe.models import CascadeMaskRCNNConfig, CascadeRCNNConfig


class Stage(NamedTuple):
    """One head: the IoU at which a proposal answers for an object, the scale of deltas, the losses' weight."""

    iou: float
    box_stds: tuple[float, float, float, float]
    loss_weight: float


STAGES = (
    Stage(0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)


class CascadeRCNN(FasterRCNN):
    """Faster R-CNN whose RoI head is the first of several; build it with :func:`cascade_rcnn`.

    The losses of the later heads have ``_2`` and ``_3`` after their names. Raw predictions hold the first
    head's outputs where Faster R-CNN has its own, which ``classify`` gives, too; the others' are in ``later``.

    Args:
        parts: what two-stage detectors have in common.
        stages: the heads' settings, in their order.
        mask_branch: with a head for each stage; none without masks.
    """

    family = "cascade_rcnn"

    def __init__(
        self, parts: TwoStageParts, stages: Sequence[Stage] = STAGES, mask_branch: MaskBranch | None = None
    ) -> None:
        channels = next(iter(parts.neck.channels.values()))
        first, *later = (
            RoIHead(
                channels,
                len(parts.classes),
                iou=stage.iou,
                box_stds=stage.box_stds,
                class_agnostic=True,
                convention=parts.config.convention,
            )
            for stage in stages
        )
        super().__init__(parts, first, mask_branch)
        self.later_heads = nn.ModuleList(later)
        self.loss_weights = [stage.loss_weight for stage in stages]

    def _stages(
        self, rpn: DenseOutputs, proposals: list[Tensor], pyramid: Pyramid, batch: Batch
    ) -> TwoStageOutputs:
        first = outputs = super()._stages(rpn, proposals, pyramid, batch)
        head, later = self.roi_head, []
        for stage, next_head in enumerate(self.later_heads, start=1):
            assert isinstance(next_head, RoIHead)
            refined = self._refine(head, outputs, batch)
            head = next_head
            outputs = self._look(stage, head, first.rpn, refined, pyramid, batch)
            later.append(outputs)
        first.later = later
        return first

    @torch.no_grad()
    def _refine(self, head: RoIHead, outputs: TwoStageOutputs, batch: Batch) -> list[Tensor]:
        """The boxes that a head makes of its proposals; no gradient flows through them.

        In training without those of the objects themselves, which every stage has among its proposals anew, and
        without those that have no area left within the image.
        """
        counts = [len(proposals_R4) for proposals_R4 in outputs.proposals]
        boxes_R4 = head.coder.decode_single(outputs.roi_deltas_RQ4[:, :4].float(), torch.cat(outputs.proposals))
        refined = []
        for i, boxes in enumerate(boxes_R4.split(counts)):
            boxes = clip_to_image(boxes, batch.sizes[i])
            if outputs.roi_labels is not None and batch.targets is not None:
                objects_K4 = batch.targets[i]["boxes"].float()
                is_object_R = (outputs.proposals[i][:, None] == objects_K4).all(dim=2).any(dim=1)
                boxes = boxes[~is_object_R]
                boxes = boxes[remove_small_boxes(boxes, min_size=1e-2)]
            refined.append(boxes)
        return refined

    def losses(self, outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(outputs, TwoStageOutputs)
        losses = super().losses(outputs, batch)
        weights = self.loss_weights[1 : 1 + len(outputs.later)]
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            for number, (weight, stage) in enumerate(zip(weights, outputs.later, strict=True), start=2):
                losses |= {f"{name}_{number}": weight * loss for name, loss in roi_losses(stage).items()}
        return losses

    def _answers(self, outputs: TwoStageOutputs) -> tuple[Tensor, Tensor]:
        assert outputs.roi_labels is None, (
            "in training each stage has proposals of its own: predict in eval mode"
        )
        stages = [outputs, *outputs.later]
        logits = torch.stack([stage.roi_logits_RQ.float() for stage in stages])
        if self.convention == "torchvision":
            scores_RQ = logits.softmax(dim=2).mean(dim=0)
        else:
            scores_RQ = logits.mean(dim=0).softmax(dim=1)
        last = (self.roi_head, *self.later_heads)[len(outputs.later)]
        assert isinstance(last, RoIHead)
        deltas_R4 = stages[-1].roi_deltas_RQ4[:, :4].float()
        boxes_R4 = last.coder.decode_single(deltas_R4, torch.cat(stages[-1].proposals))
        return scores_RQ[:, 1:], boxes_R4[:, None].expand(-1, len(self.classes), 4)


class CascadeMaskRCNN(CascadeRCNN):
    """A Cascade R-CNN with a mask head for each stage; build it with :func:`cascade_mask_rcnn`."""

    family = "cascade_mask_rcnn"
    needs_masks = True


def build_cascade_rcnn(config: CascadeRCNNConfig, classes: Sequence[str]) -> CascadeRCNN:
    """A Cascade R-CNN over any timm backbone: three RoI heads, each of which samples ``roi_samples``."""
    return CascadeRCNN(build_parts(config, classes))


def build_cascade_mask_rcnn(config: CascadeMaskRCNNConfig, classes: Sequence[str]) -> CascadeMaskRCNN:
    """A Cascade R-CNN with three mask heads."""
    parts = build_parts(config, classes)
    branch = MaskBranch(parts.backbone.channels, config.channels, len(classes), len(STAGES), config.convention)
    return CascadeMaskRCNN(parts, mask_branch=branch)
