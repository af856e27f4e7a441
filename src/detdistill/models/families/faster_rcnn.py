"""Faster R-CNN with a feature pyramid: two-stage (Ren et al. 2015; Lin et al. 2017).

The same losses and detections as torchvision's ``FasterRCNN``; a test holds the proof. Labels are 0-based
outside; inside the RoI head class 0 is the background, as in torchvision. The convention ``mmdet`` gives
MMDetection's detections: anchors are not rounded to whole pixels, cells are exactly a stride apart, no box is
less than 16/1000 of its anchor wide or high, and regions are pooled its way
(:class:`~detdistill.models.layers.heads.AlignedRoIAlign`). Mask R-CNN and Cascade R-CNN build on it.
Shape legend: N images, P all anchors of an image, R proposals, Q classes, K objects, M proposals with masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from detdistill.models.base import (
    Batch,
    Candidates,
    DenseOutputs,
    Detections,
    ExportableDetector,
    HeadOutputs,
    Preprocess,
    Pyramid,
    Target,
    TwoStageOutputs,
)
from detdistill.models.families.two_stage import (
    LEAST_PROPOSAL,
    POOLED,
    RPN_NMS_THRESHOLD,
    RoIHead,
    TwoStageParts,
    best_anchors,
    build_parts,
    suppress_proposals,
)
from detdistill.models.layers.heads import (
    IGNORED,
    best_detections,
    best_scores,
    box_coder,
    clip_to_image,
    flatten_maps,
    gather_matched_boxes,
    in_original_pixels,
    level_anchors,
    match_boxes,
    pool_regions,
    region_pool,
    suppressed,
)
from detdistill.models.layers.masks import MaskBranch, crop_masks, mask_loss, paste_masks
from detdistill.recipe.models import FasterRCNNConfig

BETA = 1 / 9  # where smooth L1 turns from a parabola into a line
RPN_LIMIT = {True: 2000, False: 1000}  # proposals, in training and not: of a level before, of an image after
LEAST_SIDE = 1e-2  # pixels of network input: smaller boxes are no detections
CANDIDATES = 2000  # of an image, in a graph


class Sample(NamedTuple):
    """An image's proposals to learn from: boxes, labels (0: background), wanted deltas, indices of objects."""

    proposals_R4: Tensor
    labels_R: Tensor
    targets_R4: Tensor
    objects_R: Tensor


class FasterRCNN(ExportableDetector):
    """The five steps of Faster R-CNN, and of Mask R-CNN; build it with :func:`faster_rcnn`.

    Losses: ``loss_objectness`` and ``loss_rpn_box_reg`` over the sampled anchors, ``loss_classifier`` and
    ``loss_box_reg`` over the sampled proposals, each a sum divided by the number sampled; ``loss_mask``, where
    there is a mask branch, over those proposals that answer for an object. Proposals are sampled in ``predict``
    and anchors in ``losses``, both from torch's global random state.
    """

    family = "faster_rcnn"
    kind = "two_stage"
    needs_sizes = True
    any_batch = False

    def __init__(self, parts: TwoStageParts, roi_head: RoIHead, mask_branch: MaskBranch | None = None) -> None:
        super().__init__()
        config = parts.config
        self.backbone = parts.backbone
        self.neck = parts.neck
        self.rpn = parts.rpn
        self.roi_head = roi_head
        self.mask_branch = mask_branch
        self.anchor_generator = parts.anchor_generator
        self.classes = parts.classes
        self.preprocessor = Preprocess(mean=parts.backbone.mean, std=parts.backbone.std)
        self.pyramid_channels = parts.neck.channels
        self.convention = config.convention
        self.roi_pool = region_pool(parts.backbone.channels, POOLED, config.convention)
        self.rpn_coder = box_coder((1.0, 1.0, 1.0, 1.0), config.convention)
        self.rpn_sampler = BalancedPositiveNegativeSampler(config.rpn_samples, positive_fraction=0.5)
        self.roi_sampler = BalancedPositiveNegativeSampler(config.roi_samples, positive_fraction=0.25)
        self.score_threshold = config.score_threshold
        self.nms_threshold = config.nms_threshold
        self.max_detections = config.max_detections

    def forward_features(self, batch: Batch) -> Pyramid:
        return self.neck(self.backbone(batch.images_N3HW))

    def forward_head(self, pyramid: Pyramid, batch: Batch) -> TwoStageOutputs:
        rpn = self.rpn(pyramid)
        return self._stages(rpn, self._propose(rpn, batch), pyramid, batch)

    def _stages(
        self, rpn: DenseOutputs, proposals: list[Tensor], pyramid: Pyramid, batch: Batch
    ) -> TwoStageOutputs:
        """What the second stage says of the proposals; a cascade has more of them."""
        return self._look(0, self.roi_head, rpn, proposals, pyramid, batch)

    def classify(self, pyramid: Pyramid, proposals: list[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """What the second stage (of a cascade: its first head) says of any regions.

        Args:
            pyramid, batch: of this detector.
            proposals: per image (R_n, 4) xyxy in network input.

        Returns:
            class logits (R, Q + 1) with the background at index 0, box deltas (R, 4·(Q + 1)).
        """
        return self.roi_head(pool_regions(self.roi_pool, pyramid, proposals, batch))

    def _look(
        self,
        stage: int,
        head: RoIHead,
        rpn: DenseOutputs,
        proposals: list[Tensor],
        pyramid: Pyramid,
        batch: Batch,
    ) -> TwoStageOutputs:
        """What a head says of the proposals; in training of a sample of them, beside what it should say."""
        samples: list[Sample] = []
        if self.training and batch.targets is not None:
            samples = [self._sample(head, *pair) for pair in zip(proposals, batch.targets, strict=True)]
            proposals = [sample.proposals_R4 for sample in samples]
        logits_RQ, deltas_RQ4 = head(pool_regions(self.roi_pool, pyramid, proposals, batch))
        outputs = TwoStageOutputs(rpn, proposals, logits_RQ, deltas_RQ4)
        if samples:
            outputs.roi_labels = [sample.labels_R for sample in samples]
            outputs.roi_targets = [sample.targets_R4 for sample in samples]
        if self.mask_branch is not None:
            outputs.pyramid = pyramid
            if samples:
                outputs.mask_logits, outputs.mask_targets = self._draw(stage, samples, pyramid, batch)
        return outputs

    def _draw(
        self, stage: int, samples: Sequence[Sample], pyramid: Pyramid, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The masks (M, 28, 28) of the sampled proposals that answer for an object, and what they should be."""
        assert self.mask_branch is not None
        assert batch.targets is not None
        positive = [torch.where(sample.labels_R > 0)[0] for sample in samples]
        regions = [sample.proposals_R4[at] for sample, at in zip(samples, positive, strict=True)]
        labels_M = torch.cat([sample.labels_R[at] for sample, at in zip(samples, positive, strict=True)])
        wanted = [
            crop_masks(target["masks"], region, sample.objects_R[at])
            for target, region, sample, at in zip(batch.targets, regions, samples, positive, strict=True)
        ]
        return self.mask_branch.logits(stage, pyramid, regions, labels_M, batch), torch.cat(wanted)

    @torch.no_grad()
    def sample(self, pyramid: Pyramid, batch: Batch) -> list[Sample]:
        """What its (of a cascade: its first) head would learn from, also of a detector that does not train."""
        assert batch.targets is not None, "regions are sampled for a batch with targets"
        proposals = self._propose(self.rpn(pyramid), batch)
        return [self._sample(self.roi_head, *pair) for pair in zip(proposals, batch.targets, strict=True)]

    def anchors(self, pyramid: Pyramid, batch: Batch) -> list[Tensor]:
        """What the RPN answers for, level by level: (H·W·A, 4) xyxy in network input, rows first."""
        return level_anchors(self.anchor_generator, pyramid, batch, self.convention != "torchvision")

    @torch.no_grad()
    def _propose(self, rpn: DenseOutputs, batch: Batch) -> list[Tensor]:
        """The regions worth a second look, (R_n, 4) for each image; no gradient flows through them."""
        limit = RPN_LIMIT[self.training]
        by_level = best_anchors(rpn, self.anchors(rpn.cls, batch), self.rpn_coder, limit)
        boxes_NM4, scores_NM = (torch.cat(parts, dim=1) for parts in zip(*by_level, strict=True))
        levels_NM = torch.cat([torch.full_like(x, i) for i, (_, x) in enumerate(by_level)], dim=1)
        proposals = []
        for i, size in enumerate(batch.sizes):
            clipped = clip_boxes_to_image(boxes_NM4[i], size)
            solid = remove_small_boxes(clipped, min_size=LEAST_PROPOSAL)
            clipped = clipped[solid]
            kept = batched_nms(clipped, scores_NM[i][solid], levels_NM[i][solid], RPN_NMS_THRESHOLD)
            proposals.append(clipped[kept[:limit]])
        return proposals

    def candidates(self, batch: Batch) -> Candidates:
        """Of one image, with as many proposals as there may be: those that are suppressed have no score."""
        rpn = self.rpn(pyramid := self.forward_features(batch))
        (size,), limit = batch.sizes, RPN_LIMIT[False]
        by_level = best_anchors(rpn, self.anchors(rpn.cls, batch), self.rpn_coder, limit)
        kept = [suppress_proposals(*boxes_and_scores, size) for boxes_and_scores in by_level]
        boxes_M4, scores_M = (torch.cat(parts) for parts in zip(*kept, strict=True))
        scores_R, at_R = scores_M.topk(min(limit, len(scores_M)))
        outputs = self._stages(rpn, [boxes_M4[at_R]], pyramid, batch)
        scores_RQ, boxes_RQ4 = self._answers(outputs)
        boxes_RQ4 = clip_to_image(boxes_RQ4, size)
        solid_RQ = (boxes_RQ4[..., 2:] - boxes_RQ4[..., :2] >= LEAST_SIDE).all(dim=2)
        kept_RQ = solid_RQ & (scores_RQ > self.score_threshold) & (scores_R >= 0)[:, None]
        scores_1M, rows_1M, labels_1M = best_scores(torch.where(kept_RQ, scores_RQ, 0.0)[None], CANDIDATES)
        found = Candidates(boxes_RQ4[rows_1M, labels_1M], scores_1M, labels_1M)
        if self.mask_branch is None:
            return found
        assert self.nms_threshold is not None
        found = suppressed(found, self.nms_threshold, self.max_detections)
        boxes_and_labels = [{"boxes": found.boxes_NM4[0], "labels": found.labels_NM[0]}]
        assert outputs.pyramid is not None
        (masks_MSS,) = self.mask_branch.probabilities(outputs.pyramid, boxes_and_labels, batch)
        return found._replace(masks_NMSS=masks_MSS[None])

    @torch.no_grad()
    def _sample(self, head: RoIHead, proposals_R4: Tensor, target: Target) -> Sample:
        """What a head learns from: some of the proposals, the objects themselves among them."""
        boxes_K4 = target["boxes"].float()
        proposals_R4 = torch.cat([proposals_R4, boxes_K4])
        matched_R = match_boxes(boxes_K4, proposals_R4, high=head.iou, low=head.iou, keep_best=False)
        labels_R = torch.zeros_like(matched_R)
        if len(boxes_K4):
            labels_R = torch.where(matched_R >= 0, target["labels"][matched_R.clamp(min=0)] + 1, 0)
        (positive,), (negative,) = self.roi_sampler([labels_R])
        chosen = torch.where(positive | negative)[0]
        proposals_R4, labels_R, matched_R = proposals_R4[chosen], labels_R[chosen], matched_R[chosen]
        objects_R4 = gather_matched_boxes(matched_R, boxes_K4, proposals_R4)
        return Sample(proposals_R4, labels_R, head.coder.encode_single(objects_R4, proposals_R4), matched_R)

    def losses(self, outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(outputs, TwoStageOutputs)
        assert batch.targets is not None, "losses need a batch with targets"
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            return {**self._rpn_losses(outputs.rpn, batch, batch.targets), **roi_losses(outputs)}

    def _rpn_losses(self, rpn: DenseOutputs, batch: Batch, targets: Sequence[Target]) -> dict[str, Tensor]:
        logits_NP = torch.cat(flatten_maps(rpn.cls.values(), 1), dim=1).squeeze(2)
        deltas_NP4 = torch.cat(flatten_maps(rpn.box.values(), 4), dim=1)
        anchors_P4 = torch.cat(self.anchors(rpn.cls, batch))
        labels, wanted = [], []
        for target in targets:
            boxes_K4 = target["boxes"].float()
            matched_P = match_boxes(boxes_K4, anchors_P4, high=0.7, low=0.3, keep_best=True)
            labels.append(torch.where(matched_P == IGNORED, -1.0, (matched_P >= 0).float()))
            objects_P4 = gather_matched_boxes(matched_P, boxes_K4, anchors_P4)
            wanted.append(self.rpn_coder.encode_single(objects_P4, anchors_P4))
        positive, negative = (torch.stack(masks).bool() for masks in self.rpn_sampler(labels))
        sampled = positive | negative
        count = sampled.sum().clamp(min=1)
        bce_NP = F.binary_cross_entropy_with_logits(logits_NP, positive.float(), reduction="none")
        box_NP4 = F.smooth_l1_loss(deltas_NP4, torch.stack(wanted), beta=BETA, reduction="none")
        return {
            "loss_objectness": torch.where(sampled, bce_NP, 0).sum() / count,
            "loss_rpn_box_reg": torch.where(positive[..., None], box_NP4, 0).sum() / count,
        }

    def decode(self, outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(outputs, TwoStageOutputs)
        found = self._find(outputs, batch)
        masks = None
        if self.mask_branch is not None:
            assert outputs.pyramid is not None
            masks = self.mask_branch.probabilities(outputs.pyramid, found, batch)
        for i, detections in enumerate(found):
            size, original_size = batch.sizes[i], batch.original_sizes[i]
            detections["boxes"] = in_original_pixels(detections["boxes"], size, original_size)
            if masks is not None:
                detections["masks"] = paste_masks(masks[i], detections["boxes"], original_size, self.convention)
        return found

    def _find(self, outputs: TwoStageOutputs, batch: Batch) -> list[Detections]:
        """The detections, with boxes in network input."""
        counts = [len(proposals_R4) for proposals_R4 in outputs.proposals]
        num_classes = len(self.classes)
        scores_RQ, boxes_RQ4 = self._answers(outputs)
        found = []
        for i, (scores, boxes) in enumerate(zip(scores_RQ.split(counts), boxes_RQ4.split(counts), strict=True)):
            size = batch.sizes[i]
            at = torch.where(scores.flatten() > self.score_threshold)[0]
            boxes_M4 = clip_boxes_to_image(boxes.flatten(0, 1)[at], size)
            solid = remove_small_boxes(boxes_M4, min_size=LEAST_SIDE)
            boxes_M4, at = boxes_M4[solid], at[solid]
            scores_M, labels_M = scores.flatten()[at], at % num_classes
            limits = (self.nms_threshold, self.max_detections)
            found.append(best_detections(boxes_M4, scores_M, labels_M, *limits, size, original_size=size))
        return found

    def _answers(self, outputs: TwoStageOutputs) -> tuple[Tensor, Tensor]:
        """Probabilities (R, Q), the background's left out, and boxes (R, Q, 4) in network input."""
        scores_RQ = outputs.roi_logits_RQ.float().softmax(dim=1)
        decoded = self.roi_head.coder.decode_single(
            outputs.roi_deltas_RQ4.float(), torch.cat(outputs.proposals)
        )
        return scores_RQ[:, 1:], decoded.unflatten(1, (-1, 4))[:, 1:]


def roi_losses(outputs: TwoStageOutputs) -> dict[str, Tensor]:
    """The losses of one head on the proposals that it sampled."""
    assert outputs.roi_labels is not None, "losses need raw predictions made in training mode"
    assert outputs.roi_targets is not None
    labels_R, wanted_R4 = torch.cat(outputs.roi_labels), torch.cat(outputs.roi_targets)
    count = max(1, len(labels_R))
    deltas_RQ4 = outputs.roi_deltas_RQ4.float().unflatten(1, (-1, 4))
    deltas_R4 = deltas_RQ4.gather(1, labels_R[:, None, None].expand(-1, 1, 4)).squeeze(1)
    box_R4 = F.smooth_l1_loss(deltas_R4, wanted_R4, beta=BETA, reduction="none")
    losses = {
        "loss_classifier": F.cross_entropy(outputs.roi_logits_RQ.float(), labels_R, reduction="sum") / count,
        "loss_box_reg": torch.where(labels_R[:, None] > 0, box_R4, 0).sum() / count,
    }
    if outputs.mask_logits is not None and outputs.mask_targets is not None:
        losses["loss_mask"] = mask_loss(outputs.mask_logits, outputs.mask_targets)
    return losses


def build_faster_rcnn(config: FasterRCNNConfig, classes: Sequence[str]) -> FasterRCNN:
    """A Faster R-CNN over any timm backbone; ``convention`` is torchvision or MMDetection."""
    parts = build_parts(config, classes)
    return FasterRCNN(parts, RoIHead(config.channels, len(classes), convention=config.convention))
