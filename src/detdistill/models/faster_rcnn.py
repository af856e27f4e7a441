"""Faster R-CNN with a feature pyramid: two-stage (Ren et al. 2015; Lin et al. 2017).

The same losses and detections as torchvision's ``FasterRCNN``; a test holds the proof. Labels are 0-based
outside; inside the RoI head class 0 is the background, as in torchvision.
Shape legend: N images, P all anchors of an image, R proposals, Q classes, K objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, remove_small_boxes

from detdistill.models.backbones import Backbone, FeaturePyramid, split_strides
from detdistill.models.base import (
    Batch,
    DenseRaw,
    Detections,
    Detector,
    Preprocess,
    Pyramid,
    Raw,
    Target,
    TwoStageRaw,
)
from detdistill.models.heads import (
    IGNORED,
    best_detections,
    flatten_maps,
    init_head,
    level_anchors,
    match_boxes,
    take_objects,
    tower,
)

RATIOS = (0.5, 1.0, 2.0)
BETA = 1 / 9  # where smooth L1 turns from a parabola into a line
RPN_NMS_THRESHOLD = 0.7
RPN_LIMIT = {True: 2000, False: 1000}  # proposals, in training and not: of a level before, of an image after
POOLED = 7  # cells of a pooled region


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


class RoIHead(nn.Module):
    """Two linear layers over the pooled region, then Q + 1 classes and a box for each."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        width = 4 * channels  # 1024 at 256 channels; a narrow pyramid gets a head in proportion
        self.fc6 = nn.Linear(channels * POOLED**2, width)
        self.fc7 = nn.Linear(width, width)
        self.cls = nn.Linear(width, num_classes + 1)
        self.box = nn.Linear(width, 4 * (num_classes + 1))

    def forward(self, pooled_RC77: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fc7(F.relu(self.fc6(pooled_RC77.flatten(1)))))
        return self.cls(x), self.box(x)


class FasterRCNN(Detector):
    """The five steps of Faster R-CNN; build it with :func:`faster_rcnn`.

    Losses: ``loss_objectness`` and ``loss_rpn_box_reg`` over the sampled anchors, ``loss_classifier`` and
    ``loss_box_reg`` over the sampled proposals, each a sum divided by the number sampled. Proposals are sampled
    in ``predict`` and anchors in ``losses``, both from torch's global random state.
    """

    kind = "two_stage"

    def __init__(
        self,
        backbone: Backbone,
        neck: FeaturePyramid,
        rpn: RPNHead,
        roi_head: RoIHead,
        anchor_generator: AnchorGenerator,
        classes: Sequence[str],
        preprocess: Preprocess,
        *,
        score_threshold: float,
        nms_threshold: float,
        max_detections: int,
        rpn_samples: int,
        roi_samples: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.roi_head = roi_head
        self.anchor_generator = anchor_generator
        self.classes = tuple(classes)
        self.preprocessor = preprocess
        self.pyramid_channels = neck.channels
        self.roi_pool = MultiScaleRoIAlign(
            [str(stride) for stride in backbone.channels], output_size=POOLED, sampling_ratio=2
        )
        self.rpn_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.roi_coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
        self.rpn_sampler = BalancedPositiveNegativeSampler(rpn_samples, positive_fraction=0.5)
        self.roi_sampler = BalancedPositiveNegativeSampler(roi_samples, positive_fraction=0.25)
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections

    def pyramid(self, batch: Batch) -> Pyramid:
        return self.neck(self.backbone(batch.images_N3HW))

    def predict(self, pyramid: Pyramid, batch: Batch) -> TwoStageRaw:
        rpn = self.rpn(pyramid)
        proposals = self._propose(rpn, batch)
        labels: list[Tensor] | None = None
        regression: list[Tensor] | None = None
        if self.training and batch.targets is not None:
            sampled = [self._sample(*pair) for pair in zip(proposals, batch.targets, strict=True)]
            proposals, labels, regression = (list(parts) for parts in zip(*sampled, strict=True))
        logits_RQ, deltas_RQ4 = self.classify(pyramid, proposals, batch)
        return TwoStageRaw(rpn, proposals, logits_RQ, deltas_RQ4, labels, regression)

    def classify(self, pyramid: Pyramid, proposals: list[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """What the second stage says of any regions.

        Args:
            pyramid, batch: of this detector.
            proposals: per image (R_n, 4) xyxy in network input.

        Returns:
            class logits (R, Q + 1) with the background at index 0, box deltas (R, 4·(Q + 1)).
        """
        # The padded size, of which every level is an exact fraction, tells the pooling each level's stride.
        pooled_RC77 = self.roi_pool(
            {str(stride): x for stride, x in pyramid.items()}, proposals, [batch.padded_size] * len(proposals)
        )
        return self.roi_head(pooled_RC77)

    def anchors(self, pyramid: Pyramid, batch: Batch) -> list[Tensor]:
        """What the RPN answers for, level by level: (H·W·A, 4) xyxy in network input, rows first."""
        return level_anchors(self.anchor_generator, pyramid, batch)

    @torch.no_grad()
    def _propose(self, rpn: DenseRaw, batch: Batch) -> list[Tensor]:
        """The regions worth a second look, (R_n, 4) for each image; no gradient flows through them."""
        limit = RPN_LIMIT[self.training]
        boxes, scores, levels = [], [], []
        anchors = self.anchors(rpn.cls, batch)
        maps = zip(flatten_maps(rpn.cls.values(), 1), flatten_maps(rpn.box.values(), 4), anchors, strict=True)
        for level, (logits_NP1, deltas_NP4, anchors_P4) in enumerate(maps):
            top_NM, at_NM = logits_NP1.squeeze(2).topk(min(limit, len(anchors_P4)), dim=1)
            deltas_NM4 = deltas_NP4.gather(1, at_NM[..., None].expand(-1, -1, 4))
            decoded = self.rpn_coder.decode_single(deltas_NM4.flatten(0, 1), anchors_P4[at_NM].flatten(0, 1))
            boxes.append(decoded.view_as(deltas_NM4))
            scores.append(top_NM.sigmoid())
            levels.append(torch.full_like(at_NM, level))
        boxes_NM4, scores_NM, levels_NM = (torch.cat(parts, dim=1) for parts in (boxes, scores, levels))
        proposals = []
        for i, size in enumerate(batch.sizes):
            clipped = clip_boxes_to_image(boxes_NM4[i], size)
            solid = remove_small_boxes(clipped, min_size=1e-3)
            clipped = clipped[solid]
            kept = batched_nms(clipped, scores_NM[i][solid], levels_NM[i][solid], RPN_NMS_THRESHOLD)
            proposals.append(clipped[kept[:limit]])
        return proposals

    @torch.no_grad()
    def _sample(self, proposals_R4: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals to learn from (the objects themselves among them), their labels and regression targets."""
        boxes_K4 = target["boxes"].float()
        proposals_R4 = torch.cat([proposals_R4, boxes_K4])
        matched_R = match_boxes(boxes_K4, proposals_R4, high=0.5, low=0.5, keep_best=False)
        labels_R = torch.zeros_like(matched_R)
        if len(boxes_K4):
            labels_R = torch.where(matched_R >= 0, target["labels"][matched_R.clamp(min=0)] + 1, 0)
        (positive,), (negative,) = self.roi_sampler([labels_R])
        chosen = torch.where(positive | negative)[0]
        proposals_R4, labels_R = proposals_R4[chosen], labels_R[chosen]
        objects_R4 = take_objects(matched_R[chosen], boxes_K4, proposals_R4)
        return proposals_R4, labels_R, self.roi_coder.encode_single(objects_R4, proposals_R4)

    def losses(self, raw: Raw, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(raw, TwoStageRaw)
        assert batch.targets is not None, "losses need a batch with targets"
        assert raw.roi_labels is not None, "losses need raw predictions made in training mode"
        assert raw.roi_targets is not None
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            labels_R, wanted_R4 = torch.cat(raw.roi_labels), torch.cat(raw.roi_targets)
            count = max(1, len(labels_R))
            deltas_RQ4 = raw.roi_deltas_RQ4.float().unflatten(1, (-1, 4))
            deltas_R4 = deltas_RQ4.gather(1, labels_R[:, None, None].expand(-1, 1, 4)).squeeze(1)
            box_R4 = F.smooth_l1_loss(deltas_R4, wanted_R4, beta=BETA, reduction="none")
            return {
                **self._rpn_losses(raw.rpn, batch, batch.targets),
                "loss_classifier": F.cross_entropy(raw.roi_logits_RQ.float(), labels_R, reduction="sum")
                / count,
                "loss_box_reg": torch.where(labels_R[:, None] > 0, box_R4, 0).sum() / count,
            }

    def _rpn_losses(self, rpn: DenseRaw, batch: Batch, targets: Sequence[Target]) -> dict[str, Tensor]:
        logits_NP = torch.cat(flatten_maps(rpn.cls.values(), 1), dim=1).squeeze(2)
        deltas_NP4 = torch.cat(flatten_maps(rpn.box.values(), 4), dim=1)
        anchors_P4 = torch.cat(self.anchors(rpn.cls, batch))
        labels, wanted = [], []
        for target in targets:
            boxes_K4 = target["boxes"].float()
            matched_P = match_boxes(boxes_K4, anchors_P4, high=0.7, low=0.3, keep_best=True)
            labels.append(torch.where(matched_P == IGNORED, -1.0, (matched_P >= 0).float()))
            objects_P4 = take_objects(matched_P, boxes_K4, anchors_P4)
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

    def decode(self, raw: Raw, batch: Batch) -> list[Detections]:
        assert isinstance(raw, TwoStageRaw)
        counts = [len(proposals_R4) for proposals_R4 in raw.proposals]
        num_classes = len(self.classes)
        scores_RQ = raw.roi_logits_RQ.float().softmax(dim=1)[:, 1:]
        decoded = self.roi_coder.decode_single(raw.roi_deltas_RQ4.float(), torch.cat(raw.proposals))
        boxes_RQ4 = decoded.unflatten(1, (-1, 4))[:, 1:]
        detections = []
        for i, (scores, boxes) in enumerate(zip(scores_RQ.split(counts), boxes_RQ4.split(counts), strict=True)):
            size = batch.sizes[i]
            at = torch.where(scores.flatten() > self.score_threshold)[0]
            found_M4 = clip_boxes_to_image(boxes.flatten(0, 1)[at], size)
            solid = remove_small_boxes(found_M4, min_size=1e-2)
            found_M4, at = found_M4[solid], at[solid]
            detections.append(
                best_detections(
                    found_M4,
                    scores.flatten()[at],
                    at % num_classes,
                    self.nms_threshold,
                    self.max_detections,
                    size,
                    batch.original_sizes[i],
                )
            )
        return detections


def faster_rcnn(
    backbone: str = "resnet50",
    num_classes: int = 80,
    *,
    classes: Sequence[str] | None = None,
    channels: int = 256,
    strides: Sequence[int] = (4, 8, 16, 32, 64),
    head_depth: int = 1,
    anchor_scale: float = 8.0,
    norm: str = "batch",
    freeze_stages: int = 0,
    pretrained_backbone: bool = False,
    preprocess: Preprocess | None = None,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    rpn_samples: int = 256,
    roi_samples: int = 512,
) -> FasterRCNN:
    """A Faster R-CNN over any timm backbone; the defaults are torchvision's ``fasterrcnn_resnet50_fpn``.

    Args:
        backbone: timm model with feature maps.
        num_classes: number of classes, without the background.
        classes: their names (``num_classes`` is then their number); "0", "1", … when not given.
        channels: width of the pyramid; the RoI head's linear layers are four times as wide.
        strides: pyramid levels for proposals; regions are pooled from those that the backbone has, the levels
            beyond take every second cell.
        head_depth: 3×3 convolutions of the region proposal network.
        anchor_scale: anchor side over its level's stride; each cell has one size and 3 ratios.
        norm, freeze_stages, pretrained_backbone: as in :class:`~detdistill.models.backbones.Backbone`.
        preprocess: input convention; images as they come, with the backbone's mean and std, when not given.
        score_threshold, nms_threshold, max_detections: of detections.
        rpn_samples, roi_samples: anchors and proposals of an image that training samples.

    Raises:
        UserError: as :class:`~detdistill.models.backbones.Backbone` does.
    """
    names = tuple(classes) if classes is not None else tuple(map(str, range(num_classes)))
    body = Backbone(
        backbone, split_strides(backbone, strides),
        pretrained=pretrained_backbone, norm=norm, freeze_stages=freeze_stages,
    )  # fmt: skip
    sizes = tuple((stride * anchor_scale,) for stride in strides)
    return FasterRCNN(
        body,
        FeaturePyramid(body.channels, channels, strides, extra="pool"),
        RPNHead(channels, head_depth, len(RATIOS)),
        RoIHead(channels, len(names)),
        AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        names,
        preprocess or Preprocess(mean=body.mean, std=body.std),
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        max_detections=max_detections,
        rpn_samples=rpn_samples,
        roi_samples=roi_samples,
    )
