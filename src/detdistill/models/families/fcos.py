"""FCOS: one-stage, anchor-free (Tian et al., "FCOS: A Simple and Strong Anchor-Free Object Detector", 2020).

The same losses and detections as torchvision's ``FCOS``; a test holds the proof. Other conventions give
MMDetection's detections:

- ``mmdet_tricks``, its configs with normalized boxes: each level scales its box outputs by a factor of its own;
  cell i's center is at (i + 0.5) · stride; candidates are chosen by their class score, and ranked by class
  score times centerness, where torchvision takes the root of it for both.
- ``mmdet``, its plain configs: as well a side is exp(x) pixels, and centerness is beside the classes.

What is learnt is the same in all; MMDetection's plain configs have an IoU loss and no center sampling.

Shape legend: N images, P all cells of an image, Q classes, K objects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.ops import sigmoid_focal_loss

from detdistill.models.base import Batch, DenseOutputs, HeadOutputs, Pyramid
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.backbones import Backbone, FeaturePyramid, split_strides
from detdistill.models.layers.heads import (
    UNMATCHED,
    DenseHead,
    avg_factor,
    flatten_maps,
    gather_matched_boxes,
    giou_loss,
    init_head,
    one_hot_targets,
    square_cells,
)
from detdistill.recipe.models import Convention, FCOSConfig

CODER = BoxLinearCoder(normalize_by_size=True)
CENTER_RADIUS = 1.5  # in strides: how far from an object's center a cell may answer for it
RANGE = (4.0, 8.0)  # in strides: a level's objects reach so far from the cell (64…128 at stride 16)


class FCOSHead(DenseHead):
    """Two towers with GroupNorm, shared by the levels; centerness beside the boxes (``mmdet``: the classes).

    The box output is left, top, right, bottom distance over the stride, not negative whatever the convention.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        num_classes: int,
        strides: Sequence[int],
        convention: Convention = "torchvision",
    ) -> None:
        super().__init__(channels, depth, group_norm=True)
        self.convention = convention
        levels = strides if convention != "torchvision" else ()
        self.scales = nn.ParameterDict({str(stride): torch.ones(()) for stride in levels})
        self.cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        init_head(self, class_layer=self.cls)
        # From 0, as in torchvision, half of the ReLU's outputs start dead and a high rate kills the others too
        # (bbox_regression stays at 1); 2 makes the first boxes 4 strides wide, the middle of a level's range.
        assert self.box.bias is not None
        nn.init.constant_(self.box.bias, 2.0)

    def outputs(self, cls: Pyramid, box: Pyramid) -> DenseOutputs:
        return DenseOutputs(
            cls={stride: self.cls(x) for stride, x in cls.items()},
            box={stride: self._distances(stride, self.box(x)) for stride, x in box.items()},
            centerness={
                stride: self.centerness(x) for stride, x in (cls if self.convention == "mmdet" else box).items()
            },
        )

    def _distances(self, stride: int, x: Tensor) -> Tensor:
        if self.convention == "torchvision":
            return F.relu(x)
        x = x.float() * self.scales[str(stride)]
        return x.exp() / stride if self.convention == "mmdet" else F.relu(x)


class FCOS(OneStage):
    """The five steps of FCOS; build it with :func:`fcos`.

    Losses: ``classification`` (focal, α 0.25, γ 2), ``bbox_regression`` (GIoU) and ``bbox_ctrness`` (binary
    cross-entropy), each summed over the batch and divided by the batch's number of matched cells (at least 1).
    Under torch.distributed that number is averaged over the processes, so that after the mean of gradients N
    processes equal one process on the same images; every process must then call ``losses``.
    """

    family = "fcos"
    kind = "anchor_free"
    head: FCOSHead

    def losses(self, outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(outputs, DenseOutputs)
        assert outputs.centerness is not None
        assert batch.targets is not None, "losses need a batch with targets"
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            logits_NPQ = torch.cat(flatten_maps(outputs.cls.values(), len(self.classes)), dim=1)
            distances_NP4 = torch.cat(flatten_maps(outputs.box.values(), 4), dim=1)
            centerness_NP = torch.cat(flatten_maps(outputs.centerness.values(), 1), dim=1).squeeze(2)
            cells = self.anchors(outputs.cls, batch)
            cells_P4 = torch.cat(cells)
            wanted_NPQ, boxes_NP4, positive_NP = [], [], []
            for target in batch.targets:
                boxes_K4 = target["boxes"].float()
                matched_P = self.match(boxes_K4, cells)
                wanted_NPQ.append(one_hot_targets(matched_P, target["labels"], len(self.classes)))
                boxes_NP4.append(gather_matched_boxes(matched_P, boxes_K4, cells_P4))
                positive_NP.append(matched_P >= 0)
            positive, boxes = torch.stack(positive_NP), torch.stack(boxes_NP4)
            count = avg_factor(positive.sum())
            focal = sigmoid_focal_loss(logits_NPQ, torch.stack(wanted_NPQ), reduction="sum")
            giou_NP = giou_loss(CODER.decode(distances_NP4, cells_P4), boxes)
            wanted_NP = torch.where(positive, centerness_of(CODER.encode(cells_P4, boxes)), 0)
            bce_NP = F.binary_cross_entropy_with_logits(centerness_NP, wanted_NP, reduction="none")
            return {
                "classification": focal / count,
                "bbox_regression": torch.where(positive, giou_NP, 0).sum() / count,
                "bbox_ctrness": torch.where(positive, bce_NP, 0).sum() / count,
            }

    def match(self, boxes_K4: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        return match_cells(boxes_K4, anchors)

    def scores(self, outputs: DenseOutputs) -> list[Tensor]:
        assert outputs.centerness is not None
        scores = [logits.sigmoid() for logits in flatten_maps(outputs.cls.values(), len(self.classes))]
        if self.head.convention != "torchvision":
            return scores
        centerness = flatten_maps(outputs.centerness.values(), 1)
        return [torch.sqrt(a * b.sigmoid()) for a, b in zip(scores, centerness, strict=True)]

    def score_factors(self, outputs: DenseOutputs) -> list[Tensor] | None:
        assert outputs.centerness is not None
        if self.head.convention == "torchvision":
            return None
        return [logits.sigmoid().squeeze(2) for logits in flatten_maps(outputs.centerness.values(), 1)]

    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        return CODER.decode(encoded, anchors)


def match_cells(boxes_K4: Tensor, cells: Sequence[Tensor], radius: float = CENTER_RADIUS) -> Tensor:
    """Which object each cell answers for.

    A cell answers for an object when it lies inside it, within ``radius`` strides of its center, and the
    farthest side is within the level's range; of several objects for the smallest (FCOS, section 3.1 and 3.2).

    Args:
        boxes_K4: objects; K may be 0.
        cells: for each level squares (P_l, 4) whose center is the cell and whose side is the stride.

    Returns:
        (P,) int64: index of the object or UNMATCHED.
    """
    cells_P4 = torch.cat(list(cells))
    if len(boxes_K4) == 0:
        return torch.full((len(cells_P4),), UNMATCHED, device=cells_P4.device)
    stride_P1 = cells_P4[:, 2:3] - cells_P4[:, 0:1]
    lower_P1, upper_P1 = stride_P1 * RANGE[0], stride_P1 * RANGE[1]
    lower_P1[: len(cells[0])] = 0
    upper_P1[len(cells_P4) - len(cells[-1]) :] = float("inf")
    point_P12 = ((cells_P4[:, :2] + cells_P4[:, 2:]) / 2)[:, None]
    center_K2 = (boxes_K4[:, :2] + boxes_K4[:, 2:]) / 2
    off_center_PK = (point_P12 - center_K2).abs().amax(dim=2)
    sides_PK4 = torch.cat([point_P12 - boxes_K4[:, :2], boxes_K4[:, 2:] - point_P12], dim=2)
    reach_PK = sides_PK4.amax(dim=2)
    fits_PK = (
        (off_center_PK < radius * stride_P1)
        & (sides_PK4.amin(dim=2) > 0)
        & (reach_PK > lower_P1)
        & (reach_PK < upper_P1)
    )
    area_K = (boxes_K4[:, 2:] - boxes_K4[:, :2]).prod(dim=1)
    smallest_P, object_P = torch.where(fits_PK, area_K, float("inf")).min(dim=1)
    return torch.where(smallest_P.isinf(), UNMATCHED, object_P)


def centerness_of(distances: Tensor) -> Tensor:
    """Centerness (FCOS, equation 3) of left, top, right, bottom distances (..., 4); NaN outside the box."""
    across, along = distances[..., [0, 2]], distances[..., [1, 3]]
    return torch.sqrt(across.amin(dim=-1) / across.amax(dim=-1) * (along.amin(dim=-1) / along.amax(dim=-1)))


def build_fcos(config: FCOSConfig, classes: Sequence[str]) -> FCOS:
    """An FCOS over any timm backbone; ``convention`` decides where torchvision and MMDetection differ."""
    body = Backbone.of(config, split_strides(config.backbone, config.strides))
    cells = square_cells(config.strides)
    if config.convention != "torchvision":
        cells.cell_anchors = [
            cell + stride / 2 for cell, stride in zip(cells.cell_anchors, config.strides, strict=True)
        ]
    neck = FeaturePyramid(body.channels, config.channels, config.strides, extra="conv")
    head = FCOSHead(config.channels, config.head_depth, len(classes), config.strides, config.convention)
    return FCOS(config, classes, body, neck, head, cells)
