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

from detdistill.config import Convention
from detdistill.models.backbones import Backbone, FeaturePyramid, split_strides
from detdistill.models.base import Batch, DenseRaw, Preprocess, Pyramid, Raw, class_names
from detdistill.models.heads import (
    IGNORED,
    DenseHead,
    ExactAnchors,
    box_coder,
    check_convention,
    flatten_maps,
    init_head,
    match_boxes,
    one_hot_targets,
    take_objects,
)
from detdistill.models.one_stage import OneStage

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

    def outputs(self, cls: Pyramid, box: Pyramid) -> DenseRaw:
        return DenseRaw(
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

    def losses(self, raw: Raw, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(raw, DenseRaw)
        assert batch.targets is not None, "losses need a batch with targets"
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            logits_NPQ = torch.cat(flatten_maps(raw.cls.values(), len(self.classes)), dim=1)
            deltas_NP4 = torch.cat(flatten_maps(raw.box.values(), 4), dim=1)
            anchors = self.anchors(raw.cls, batch)
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
                wanted_P4 = CODER.encode_single(take_objects(matched_P, boxes_K4, anchors_P4), anchors_P4)
                l1_P4 = F.l1_loss(deltas_P4, wanted_P4, reduction="none")
                regression.append(torch.where(positive_P[:, None], l1_P4, 0).sum() / count)
        return {
            "classification": torch.stack(classification).mean(),
            "bbox_regression": torch.stack(regression).mean(),
        }

    def match(self, boxes_K4: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        return match_boxes(boxes_K4, torch.cat(list(anchors)), high=0.5, low=0.4, keep_best=True)

    def scores(self, raw: DenseRaw) -> list[Tensor]:
        return [logits.sigmoid() for logits in flatten_maps(raw.cls.values(), len(self.classes))]

    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        coder = box_coder(WEIGHTS, self.convention)
        flat = coder.decode_single(encoded.reshape(-1, 4), anchors.expand_as(encoded).reshape(-1, 4))
        return flat.view_as(encoded)


def retinanet(
    backbone: str = "resnet50",
    num_classes: int = 80,
    *,
    classes: Sequence[str] | None = None,
    channels: int = 256,
    strides: Sequence[int] = (8, 16, 32, 64, 128),
    head_depth: int = 4,
    anchor_scale: float = 4.0,
    convention: Convention = "torchvision",
    norm: str = "batch",
    freeze_stages: int = 0,
    stride_in_1x1: bool = False,
    pretrained_backbone: bool = False,
    preprocess: Preprocess | None = None,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 300,
    topk_candidates: int = 1000,
) -> RetinaNet:
    """A RetinaNet over any timm backbone; the defaults are torchvision's ``retinanet_resnet50_fpn``.

    Args:
        backbone: timm model with feature maps.
        num_classes: number of classes; there is no background class.
        classes: their names (``num_classes`` is then their number); "0", "1", … when not given.
        channels: width of pyramid and head.
        strides: pyramid levels; those beyond the backbone's last stride are convolutions of stride 2.
        head_depth: 3×3 convolutions in each tower.
        anchor_scale: smallest anchor side over its level's stride; each cell has 3 sizes (a third of an octave
            apart) and 3 ratios.
        convention: where the two libraries differ, whose way is taken (see the head of this file).
        norm, freeze_stages, stride_in_1x1, pretrained_backbone: as in
            :class:`~detdistill.models.backbones.Backbone`.
        preprocess: input convention; images as they come, with the backbone's mean and std, when not given.
        score_threshold, nms_threshold, max_detections: of detections.
        topk_candidates: candidates of one level before suppression.

    Raises:
        UserError: as :class:`~detdistill.models.backbones.Backbone` does; an unknown convention.
    """
    check_convention("retinanet", convention, ("torchvision", "mmdet"))
    mmdet = convention == "mmdet"
    names = class_names(classes, num_classes)
    body = Backbone(
        backbone, split_strides(backbone, strides),
        pretrained=pretrained_backbone, norm=norm, freeze_stages=freeze_stages, stride_in_1x1=stride_in_1x1,
    )  # fmt: skip
    sides = [stride * anchor_scale for stride in strides]
    octave = [2 ** (i / 3) for i in range(3)]
    generator: AnchorGenerator
    if mmdet:
        sizes = tuple(tuple(side * factor for factor in octave) for side in sides)
        generator = ExactAnchors(sizes, (RATIOS,) * len(sizes))
        neck = FeaturePyramid(body.channels, channels, strides, extra="linear", extra_from="backbone")
    else:
        # The two larger sides are cut to whole pixels, as torchvision's anchors are.
        sizes = tuple((side, int(side * octave[1]), int(side * octave[2])) for side in sides)
        generator = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
        neck = FeaturePyramid(body.channels, channels, strides, extra="conv")
    model = RetinaNet(
        body,
        neck,
        RetinaNetHead(channels, head_depth, generator.num_anchors_per_location()[0], len(names)),
        generator,
        names,
        preprocess or Preprocess(mean=body.mean, std=body.std),
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        max_detections=max_detections,
        topk_candidates=topk_candidates,
    )
    model.convention = convention
    return model
