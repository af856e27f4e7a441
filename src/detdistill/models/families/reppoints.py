"""RepPoints: one-stage, anchor-free (Yang et al., "RepPoints: Point Set Representation for Object Detection",
ICCV 2019).

A cell places nine points, looks at the features under them, and from what it sees tells the class and moves the
points once more. Both sets of points stand for boxes, and both learn from the objects' boxes.

Paper and code: what the paper leaves open follows the authors' code. P6 and P7 are convolutions from C5 without
a ReLU between them, convolutions before a GroupNorm have no bias, cell (0, 0) has its center at (0, 0). But an
object that overlaps no first box has no cell in the second stage here; in the code it takes every cell whose
first box it does not touch.

Shape legend: N images, P all cells of an image, Q classes, K objects, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d, box_iou, sigmoid_focal_loss

from detdistill.models.base import Batch, DenseOutputs, HeadOutputs, Pyramid
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.assignment import centers
from detdistill.models.layers.backbones import Backbone, FeaturePyramid, split_strides
from detdistill.models.layers.heads import (
    IGNORED,
    UNMATCHED,
    DenseHead,
    avg_factor,
    flatten_maps,
    gather_matched_boxes,
    init_head,
    one_hot_targets,
    square_cells,
)
from detdistill.recipe.models import RepPointsConfig

TAPS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]  # of a 3×3 convolution, from its center
POINT_GRADIENT = 0.1  # share of the second look's gradient that moves the first points
MOMENT_GRADIENT = 0.01  # share of its gradient by which the multiplier of the deviations learns
SCALE = 4.0  # side, in strides, of the boxes that a level is for; box losses are in this unit
BETA = 0.11  # where the box losses turn from squares to distances
INITIAL_WEIGHT = 0.5  # of the first boxes' loss
HIGH, LOW = 0.5, 0.4  # IoU from which a first box has an object, and below which it has none


class RepPointsHead(DenseHead):
    """Two towers with GroupNorm, shared by the levels; points, and a second look through them.

    Boxes are left, top, right, bottom in strides, seen from the cell: ``initial_box`` of the first points,
    ``box`` of the moved ones. Points are y, x in turn, as a deformable convolution has its offsets.
    """

    taps: Tensor

    def __init__(self, channels: int, depth: int, num_classes: int) -> None:
        super().__init__(channels, depth, group_norm=True, bias=False)
        self.points_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.points = nn.Conv2d(channels, 2 * len(TAPS), 1)
        self.cls_look = DeformConv2d(channels, channels, 3, padding=1, bias=False)
        self.cls = nn.Conv2d(channels, num_classes, 1)
        self.box_look = DeformConv2d(channels, channels, 3, padding=1, bias=False)
        self.box = nn.Conv2d(channels, 2 * len(TAPS), 1)
        self.moment_transfer = nn.Parameter(torch.zeros(2))
        taps = torch.tensor(TAPS, dtype=torch.float32).view(1, -1, 1, 1)
        self.register_buffer("taps", taps, persistent=False)
        init_head(self, class_layer=self.cls)
        for look in (self.cls_look, self.box_look):
            nn.init.normal_(look.weight, std=0.01)

    def outputs(self, cls: Pyramid, box: Pyramid) -> DenseOutputs:
        logits: Pyramid = {}
        boxes: Pyramid = {}
        initial: Pyramid = {}
        for stride, x in box.items():
            points = self.points(F.relu(self.points_conv(x))).float()
            held = points.detach()
            offsets = scale_gradient(points, POINT_GRADIENT) - self.taps
            moved = self.box(look_at(self.box_look, x, offsets)).float() + held
            logits[stride] = self.cls(look_at(self.cls_look, cls[stride], offsets))
            boxes[stride] = moment_boxes(moved, self.moment_transfer)
            initial[stride] = moment_boxes(points, self.moment_transfer)
        return DenseOutputs(cls=logits, box=boxes, initial_box=initial)


def look_at(look: DeformConv2d, x_NCHW: Tensor, offsets: Tensor) -> Tensor:
    """Features (N, C, H, W) under each cell's points, given as offsets (N, 18, H, W) from the kernel's taps.

    In float32: bfloat16 would put a point eight cells away up to a thirty-second of a cell off.
    """
    with torch.autocast(x_NCHW.device.type, enabled=False):
        return F.relu(look(x_NCHW.float(), offsets))


def moment_boxes(points: Tensor, transfer_2: Tensor) -> Tensor:
    """Boxes of points by their moments (section 3.2, T3): mean ± exp(transfer) · standard deviation.

    Args:
        points: (N, 2n, H, W), y and x in turn; n at least 2.
        transfer_2: for width and height.

    Returns:
        (N, 4, H, W) left, top, right, bottom. Computed in float32 whatever the autocast.
    """
    with torch.autocast(points.device.type, enabled=False):
        variance_N2HW, mean_N2HW = torch.var_mean(points.float().unflatten(1, (-1, 2)), dim=1)
        # Points on one spot have no deviation; a square root has no finite slope there.
        deviation_N2HW = variance_N2HW.clamp(min=1e-12).sqrt().flip(1)
        half_N2HW = deviation_N2HW * scale_gradient(transfer_2, MOMENT_GRADIENT).exp()[:, None, None]
        center_N2HW = mean_N2HW.flip(1)
        return torch.cat([center_N2HW - half_N2HW, center_N2HW + half_N2HW], dim=1)


def scale_gradient(x: Tensor, share: float) -> Tensor:
    """x itself, with so much of its gradient."""
    held = x.detach()
    return held + share * (x - held)


class RepPoints(OneStage):
    """The five steps of RepPoints; build it with :func:`reppoints`.

    Losses: ``classification`` (focal, α 0.25, γ 2), ``bbox_regression`` of the moved points' boxes, and
    ``bbox_initial``, weighted by 0.5, of the first ones (smooth L1 of left, top, right, bottom, in units of
    four strides). First boxes learn in the cells that :func:`match_nearest` chooses, classes and moved boxes in
    those whose first box overlaps an object (:func:`match_first_boxes`). Each loss is summed over the batch and
    divided by the batch's number of its cells (at least 1). Under torch.distributed that number is averaged
    over the processes, so that after the mean of gradients N processes equal one process on the same images;
    every process must then call ``losses``.
    """

    family = "reppoints"
    kind = "anchor_free"
    convention = "mmdet"

    def losses(self, outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(outputs, DenseOutputs)
        assert outputs.initial_box is not None
        assert batch.targets is not None, "losses need a batch with targets"
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            logits_NPQ = torch.cat(flatten_maps(outputs.cls.values(), len(self.classes)), dim=1)
            first_NP4 = torch.cat(flatten_maps(outputs.initial_box.values(), 4), dim=1)
            moved_NP4 = torch.cat(flatten_maps(outputs.box.values(), 4), dim=1)
            cells = self.anchors(outputs.cls, batch)
            cells_P4 = torch.cat(cells)
            first_boxes_NP4 = self.decode_boxes(first_NP4.detach(), cells_P4)
            wanted, matched, objects = [], [], []
            for target, boxes_P4 in zip(batch.targets, first_boxes_NP4, strict=True):
                boxes_K4 = target["boxes"].float()
                matched_2P = torch.stack([self.match(boxes_K4, cells), match_first_boxes(boxes_K4, boxes_P4)])
                wanted.append(one_hot_targets(matched_2P[1], target["labels"], len(self.classes)))
                objects.append(
                    torch.stack([gather_matched_boxes(m_P, boxes_K4, cells_P4) for m_P in matched_2P])
                )
                matched.append(matched_2P)
            matched_N2P = torch.stack(matched)
            positive_N2P = matched_N2P >= 0
            first_count, count = avg_factor(positive_N2P.sum(dim=(0, 2)))
            focal_NPQ = sigmoid_focal_loss(logits_NPQ, torch.stack(wanted))
            boxes_N2P4 = torch.stack([first_NP4, moved_NP4], dim=1)
            wanted_N2P4 = in_strides(torch.stack(objects), cells_P4)
            l1_N2P4 = F.smooth_l1_loss(boxes_N2P4 / SCALE, wanted_N2P4 / SCALE, reduction="none", beta=BETA)
            first, regression = torch.where(positive_N2P[..., None], l1_N2P4, 0).sum(dim=(0, 2, 3))
            return {
                "classification": (focal_NPQ.sum(dim=2) * (matched_N2P[:, 1] != IGNORED)).sum() / count,
                "bbox_regression": regression / count,
                "bbox_initial": INITIAL_WEIGHT * first / first_count,
            }

    def match(self, boxes_K4: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        """As in the first stage, which asks no prediction."""
        return match_nearest(boxes_K4, anchors)

    def scores(self, outputs: DenseOutputs) -> list[Tensor]:
        return [logits.sigmoid() for logits in flatten_maps(outputs.cls.values(), len(self.classes))]

    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        return encoded * _stride(anchors) + _point(anchors)


def in_strides(boxes: Tensor, cells: Tensor) -> Tensor:
    """Boxes (..., 4) as the head gives them: seen from cells that broadcast to them, in strides."""
    return (boxes - _point(cells)) / _stride(cells)


def _point(cells: Tensor) -> Tensor:
    """(..., 4) the cell's x, y, x, y."""
    return torch.cat([centers(cells)] * 2, dim=-1)


def _stride(cells: Tensor) -> Tensor:
    return cells[..., 2:3] - cells[..., 0:1]


def match_nearest(boxes_K4: Tensor, cells: Sequence[Tensor]) -> Tensor:
    """Which object each cell's first points answer for.

    An object is for the level whose stride is a quarter of its side (the geometric mean of width and height),
    rounded down to a level. There it takes the cell nearest to its center, in units of its width and height; a
    cell that several objects take answers for the nearest.

    Args:
        boxes_K4: objects; K may be 0.
        cells: for each level squares (P_l, 4) whose center is the cell and whose side is the stride.

    Returns:
        (P,) int64: index of the object or UNMATCHED. No host synchronization.
    """
    cells_P4 = torch.cat(list(cells))
    if len(boxes_K4) == 0:
        return torch.full((len(cells_P4),), UNMATCHED, device=cells_P4.device)
    level_P = _stride(cells_P4).squeeze(1).log2().round()
    size_K2 = (boxes_K4[:, 2:] - boxes_K4[:, :2]).clamp(min=1e-6)
    level_K = (size_K2 / SCALE).log2().mean(dim=1).floor().clamp(level_P.min(), level_P.max())
    away_KP2 = (centers(cells_P4) - centers(boxes_K4)[:, None]) / size_K2[:, None]
    distance_KP = torch.where(level_P == level_K[:, None], away_KP2.norm(dim=2), float("inf"))
    taken_KP = torch.zeros_like(distance_KP, dtype=torch.bool)
    taken_KP.scatter_(1, distance_KP.argmin(dim=1, keepdim=True), True)
    nearest_P, object_P = torch.where(taken_KP, distance_KP, float("inf")).min(dim=0)
    return torch.where(nearest_P.isinf(), UNMATCHED, object_P)


def match_first_boxes(boxes_K4: Tensor, first_P4: Tensor) -> Tensor:
    """Which object each cell answers for after its second look, by the IoU of its first box.

    From HIGH the object that it overlaps most; between LOW and HIGH it is IGNORED. Beside that every object has
    the boxes that overlap it most (ties too), whatever their IoU above 0 and whatever else they overlap; a box
    that is the best of several objects answers for the last of them.

    Args:
        boxes_K4: objects; K may be 0.
        first_P4: boxes of the first points.

    Returns:
        (P,) int64: index of the object, UNMATCHED or IGNORED. No host synchronization.
    """
    if len(boxes_K4) == 0:
        return torch.full((len(first_P4),), UNMATCHED, device=first_P4.device)
    iou_KP = box_iou(boxes_K4, first_P4)
    best_P, object_P = iou_KP.max(dim=0)
    matched_P = torch.where(best_P < LOW, UNMATCHED, torch.where(best_P < HIGH, IGNORED, object_P))
    own_KP = (iou_KP == iou_KP.amax(dim=1, keepdim=True)) & (iou_KP > 0)
    number_K1 = torch.arange(len(boxes_K4), device=boxes_K4.device)[:, None]
    last_P = torch.where(own_KP, number_K1, UNMATCHED).amax(dim=0)
    return torch.where(last_P >= 0, last_P, matched_P)


def build_reppoints(config: RepPointsConfig, classes: Sequence[str]) -> RepPoints:
    """A RepPoints over any timm backbone, with GroupNorm in neck and head as published."""
    body = Backbone.of(config, split_strides(config.backbone, config.strides))
    neck = FeaturePyramid(
        body.channels, config.channels, config.strides, extra="linear", extra_from="backbone", group_norm=True
    )
    head = RepPointsHead(config.channels, config.head_depth, len(classes))
    return RepPoints(config, classes, body, neck, head, square_cells(config.strides))
