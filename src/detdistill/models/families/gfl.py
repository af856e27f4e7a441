"""GFL: one class score that is also the box's quality, and box sides as distributions (Li et al., "Generalized
Focal Loss", NeurIPS 2020).

With z class logits, o the IoU of an anchor's own box with its object (at the object's class; 0 at every other
class and anchor), S the softmax over the bins of a side, y the side's distance in strides and i ≤ y < i + 1::

    QFL = |o - σ(z)|² · BCE(σ(z), o)                                  Eq. 5, β = 2
    DFL = -((i + 1 - y) · log S_i + (y - i) · log S_{i+1})            Eq. 6
    a decoded side is Σ_i i · S_i                                     Eq. 4

Paper and code: what the paper leaves open follows the authors' code. P6 and P7 are convolutions from P5 without
a ReLU between them, the towers' convolutions have no bias, cell (0, 0) has its center at (0, 0) and its
neighbors exactly a stride away, and a distance is cut at 0.1 below the last bin.

Shape legend: N images, P anchors of all levels, Q classes, K objects, B bins, E = 4·B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.models.base import Batch, DenseOutputs, HeadOutputs, Pyramid
from detdistill.models.families.one_stage import OneStage
from detdistill.models.layers.assignment import atss_assign, centers
from detdistill.models.layers.backbones import Backbone, FeaturePyramid, split_strides
from detdistill.models.layers.heads import (
    DenseHead,
    avg_factor,
    flatten_maps,
    gather_matched_boxes,
    giou_loss,
    init_head,
    mean_sides,
    one_hot_targets,
    square_cells,
)
from detdistill.recipe.models import GFLConfig

ANCHOR_SCALE = 8  # side of a cell's one square anchor over its stride; the anchors serve the assignment alone
BOX_WEIGHT, DISTRIBUTION_WEIGHT = 2.0, 0.25
MARGIN = 0.1  # bins that a wanted distance keeps from the last bin


class GFLHead(DenseHead):
    """Two towers with GroupNorm, shared by the levels; each level scales its box logits by a factor of its own.

    The box output is, for left, top, right and bottom in turn, a logit for each distance 0, 1, …, bins - 1 in
    strides.

    Raises:
        ValueError: fewer than two bins.
    """

    def __init__(
        self, channels: int, depth: int, num_classes: int, strides: Sequence[int], bins: int = 17
    ) -> None:
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins}")
        super().__init__(channels, depth, group_norm=True, bias=False)
        self.bins, self.box_width = bins, 4 * bins
        self.cls = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box = nn.Conv2d(channels, self.box_width, 3, padding=1)
        self.scales = nn.ParameterDict({str(stride): torch.ones(()) for stride in strides})
        init_head(self, class_layer=self.cls)

    def outputs(self, cls: Pyramid, box: Pyramid) -> DenseOutputs:
        return DenseOutputs(
            cls={stride: self.cls(x) for stride, x in cls.items()},
            box={stride: self.box(x) * self.scales[str(stride)] for stride, x in box.items()},
        )


class GFL(OneStage):
    """The five steps of GFL; build it with :func:`gfl`.

    Losses: ``classification`` is the quality focal loss, summed over the batch and divided by its number of
    positive anchors (at least 1). ``bbox_regression`` (2 · GIoU loss) and ``bbox_distribution`` (0.25 · DFL,
    mean over the four sides) are sums over the positive anchors, each weighted by its highest class score
    (detached), divided by the sum of these weights over the batch (at least 1). Positive are the anchors that
    ATSS assigns. Under torch.distributed both divisors are averaged over the processes, so that N processes
    equal one process on the same images; every process must then call ``losses``.
    """

    family = "gfl"
    kind = "anchor"
    convention = "mmdet"
    head: GFLHead

    def losses(self, outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(outputs, DenseOutputs)
        assert batch.targets is not None, "losses need a batch with targets"
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            logits_NPQ = torch.cat(flatten_maps(outputs.cls.values(), len(self.classes)), dim=1)
            sides_NPE = torch.cat(flatten_maps(outputs.box.values(), self.head.box_width), dim=1)
            anchors = self.anchors(outputs.cls, batch)
            anchors_P4 = torch.cat(anchors)
            wanted_NPQ, objects_NP4, positive_NP = [], [], []
            for target in batch.targets:
                boxes_K4 = target["boxes"].float()
                matched_P = self.match(boxes_K4, anchors)
                wanted_NPQ.append(one_hot_targets(matched_P, target["labels"], len(self.classes)))
                objects_NP4.append(gather_matched_boxes(matched_P, boxes_K4, anchors_P4))
                positive_NP.append(matched_P >= 0)
            wanted, objects, positive = (torch.stack(x) for x in (wanted_NPQ, objects_NP4, positive_NP))

            boxes_NP4 = self.decode_boxes(sides_NPE, anchors_P4)
            quality_NP = paired_iou(boxes_NP4.detach(), objects)
            weight_NP = torch.where(positive, logits_NPQ.detach().sigmoid().amax(dim=2), 0)
            count, weight = avg_factor(torch.stack([positive.sum(), weight_NP.sum()]))
            qfl = quality_focal_loss(logits_NPQ, wanted * quality_NP[..., None])
            giou_NP = giou_loss(boxes_NP4, objects)
            distances_NP4 = encode_boxes(objects, anchors_P4)
            dfl_NP4 = distribution_focal_loss(sides_NPE.unflatten(2, (4, -1)), distances_NP4)
            return {
                "classification": qfl.sum() / count,
                "bbox_regression": BOX_WEIGHT * (weight_NP * giou_NP).sum() / weight,
                "bbox_distribution": DISTRIBUTION_WEIGHT * (weight_NP * dfl_NP4.mean(dim=2)).sum() / weight,
            }

    def match(self, boxes_K4: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        return atss_assign(boxes_K4, anchors)

    def scores(self, outputs: DenseOutputs) -> list[Tensor]:
        return [logits.sigmoid() for logits in flatten_maps(outputs.cls.values(), len(self.classes))]

    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        assert self.head.bins is not None
        distances = mean_sides(encoded, self.head.bins) * strides_of(anchors)
        point = centers(anchors)
        return torch.cat([point - distances[..., :2], point + distances[..., 2:]], dim=-1)


def strides_of(anchors: Tensor) -> Tensor:
    """(..., 1) the stride of each anchor's level."""
    return (anchors[..., 2:3] - anchors[..., 0:1]) / ANCHOR_SCALE


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(..., 4) distances of a box's sides from the anchor's center, in strides; one is negative outside it."""
    point = centers(anchors)
    return torch.cat([point - boxes[..., :2], boxes[..., 2:] - point], dim=-1) / strides_of(anchors)


def quality_focal_loss(logits: Tensor, quality: Tensor) -> Tensor:
    """QFL of each logit, not reduced; ``quality`` in [0, 1] is what its sigmoid should be."""
    bce = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return bce * (quality - logits.sigmoid()).square()


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """DFL of each side, (...), from the logits of its bins (..., B) and its distance (...) in strides.

    A distance that the bins do not reach is cut to 0 or to just below the last bin.
    """
    distances = distances.clamp(0, logits.shape[-1] - 1 - MARGIN)
    below = distances.floor()
    index = below.long()[..., None]
    log_share = logits.log_softmax(dim=-1)
    lower, upper = (log_share.gather(-1, at).squeeze(-1) for at in (index, index + 1))
    return -((below + 1 - distances) * lower + (distances - below) * upper)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """(...) IoU of boxes (..., 4) xyxy, one by one."""
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    overlap = sides.prod(dim=-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(dim=-1) for x in (a, b))
    return overlap / (area_a + area_b - overlap).clamp(min=1e-6)


def build_gfl(config: GFLConfig, classes: Sequence[str]) -> GFL:
    """A GFL over any timm backbone. A box reaches at most ``bins - 1`` strides from its cell."""
    body = Backbone.of(config, split_strides(config.backbone, config.strides))
    neck = FeaturePyramid(body.channels, config.channels, config.strides, extra="linear")
    head = GFLHead(config.channels, config.head_depth, len(classes), config.strides, config.bins)
    return GFL(config, classes, body, neck, head, square_cells(config.strides, ANCHOR_SCALE))
