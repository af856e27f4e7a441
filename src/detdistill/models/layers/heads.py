"""Parts that the families share: towers, anchors, matching, and the choice of detections.

Shape legend: N images, A anchors a cell, P all anchors of an image (levels one after the other; within a level
rows, columns, anchors), Q classes, K objects, M candidates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image, nms, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format
from torchvision.ops.poolers import LevelMapper

from detdistill.models.base import Batch, Candidates, DenseOutputs, Detections, Pyramid
from detdistill.models.layers.backbones import group_norm_of
from detdistill.recipe import Convention

UNMATCHED, IGNORED = -1, -2
GIOU_EPS = 1e-7


def tower(channels: int, depth: int, group_norm: bool, bias: bool = True) -> nn.Sequential:
    """``depth`` blocks of 3×3 convolution (with a bias, or without), perhaps GroupNorm, ReLU."""
    blocks = []
    for _ in range(depth):
        norm = [group_norm_of(channels)] if group_norm else []
        blocks.append(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=bias), *norm, nn.ReLU()))
    return nn.Sequential(*blocks)


class DenseHead(nn.Module, ABC):
    """A class tower and a box tower, shared by the levels; its child turns their maps into outputs.

    Attributes:
        box_width: numbers that encode a box: the box output has A·box_width channels.
        bins: of the distribution of each box side (box_width is then 4·bins), or None where there is none.
    """

    box_width: int = 4
    bins: int | None = None

    def __init__(self, channels: int, depth: int, group_norm: bool, bias: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.cls_tower = tower(channels, depth, group_norm, bias)
        self.box_tower = tower(channels, depth, group_norm, bias)

    @property
    def depth(self) -> int:
        """Blocks of a tower."""
        return len(self.cls_tower)

    @abstractmethod
    def outputs(self, cls: Pyramid, box: Pyramid) -> DenseOutputs:
        """Predictions from the towers' last maps."""

    def forward(self, pyramid: Pyramid, tower_features: bool = False) -> DenseOutputs:
        """Predictions; with ``tower_features`` also every block's maps before the ReLU."""
        if not tower_features:
            return self.outputs(
                {stride: self.cls_tower(x) for stride, x in pyramid.items()},
                {stride: self.box_tower(x) for stride, x in pyramid.items()},
            )
        cls = box = pyramid
        seen = []
        for cls_block, box_block in zip(self.cls_tower, self.box_tower, strict=True):
            seen.append((_before_relu(cls_block, cls), _before_relu(box_block, box)))
            cls, box = (_relu(maps) for maps in seen[-1])
        outputs = self.outputs(cls, box)
        outputs.tower_features = seen
        return outputs

    def go_on(self, cls: Pyramid, box: Pyramid, depth: int) -> DenseOutputs:
        """Predictions from maps before the ReLU of block ``depth`` (1: the first), perhaps of another head."""
        return self.outputs(
            {stride: self.cls_tower[depth:](x) for stride, x in _relu(cls).items()},
            {stride: self.box_tower[depth:](x) for stride, x in _relu(box).items()},
        )


def _before_relu(block: nn.Module, maps: Pyramid) -> Pyramid:
    assert isinstance(block, nn.Sequential)
    return {stride: block[:-1](x) for stride, x in maps.items()}


def _relu(maps: Pyramid) -> Pyramid:
    return {stride: F.relu(x) for stride, x in maps.items()}


def init_head(head: nn.Module, class_layer: nn.Conv2d | None = None, prior: float = 0.01) -> None:
    """Convolutions to N(0, 0.01) with bias 0; the class layer's bias to the prior probability of an object
    (RetinaNet, Lin et al. 2017, section 4.1)."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if class_layer is not None and class_layer.bias is not None:
        nn.init.constant_(class_layer.bias, -math.log((1 - prior) / prior))


def flatten_maps(maps: Iterable[Tensor], width: int) -> list[Tensor]:
    """Maps (N, A·width, H, W) to (N, H·W·A, width) in float32, one for each level."""
    return [
        x.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).reshape(x.shape[0], -1, width).float() for x in maps
    ]


def mean_sides(logits: Tensor, bins: int) -> Tensor:
    """(..., 4) mean of the distribution of each box side over 0…bins-1, from its logits (..., 4·bins)."""
    return logits.unflatten(-1, (4, bins)).softmax(dim=-1) @ torch.arange(bins, device=logits.device).to(logits)


def level_anchors(
    generator: AnchorGenerator, maps: Pyramid, batch: Batch, by_stride: bool = False
) -> list[Tensor]:
    """The anchors of each level, (H·W·A, 4) float32 xyxy in network input; the same for every image.

    Args:
        generator: of as many levels.
        maps: the dense outputs of each level, by stride.
        batch: what they were made from.
        by_stride: the step from cell to cell is the stride; else the padded side over the number of cells, as
            in torchvision. They differ where the padded side is no multiple of the stride.
    """
    height, width = batch.padded_size
    sizes = [list(x.shape[-2:]) for x in maps.values()]
    steps = [
        [stride, stride] if by_stride else [height // rows, width // columns]
        for stride, (rows, columns) in zip(maps, sizes, strict=True)
    ]
    generator.set_cell_anchors(torch.float32, batch.images_N3HW.device)
    return generator.grid_anchors(sizes, steps)


def box_coder(weights: tuple[float, float, float, float], convention: Convention) -> BoxCoder:
    """Boxes as differences from anchors or proposals, times weights: torchvision's way or MMDetection's."""
    return BoxCoder(weights) if convention == "torchvision" else BoundedBoxCoder(weights)


class BoundedBoxCoder(BoxCoder):
    """torchvision's coder, which bounds how much larger a box is than its anchor, with the same bound below."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        shift, scale = rel_codes.unflatten(1, (-1, 4)).split(2, dim=2)
        assert self.weights[2] == self.weights[3]
        scale = scale.clamp(min=-self.bbox_xform_clip * self.weights[2])
        return super().decode_single(torch.cat([shift, scale], dim=2).flatten(1), boxes)


class ExactAnchors(AnchorGenerator):
    """torchvision's anchors, not rounded to whole pixels."""

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  torchvision's signature
    ) -> Tensor:
        """(R·S, 4) xyxy about the origin, a ratio's sizes one after the other."""
        sides_S = torch.tensor(scales, dtype=dtype, device=device)
        stretch_R1 = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        half_A2 = torch.stack([sides_S / stretch_R1, sides_S * stretch_R1], dim=-1).flatten(0, 1) / 2
        return torch.cat([-half_A2, half_A2], dim=1)


def match_boxes(boxes_K4: Tensor, anchors_P4: Tensor, high: float, low: float, keep_best: bool) -> Tensor:
    """Which object each anchor answers for, by IoU.

    Args:
        boxes_K4: objects; K may be 0.
        anchors_P4: anchors or proposals.
        high: an anchor is matched from this IoU on; from ``low`` to ``high`` it is IGNORED, below UNMATCHED.
        keep_best: an object's best anchors (ties too) are matched whatever their IoU.

    Returns:
        (P,) int64: index of the object, UNMATCHED or IGNORED. No host synchronization.
    """
    if len(boxes_K4) == 0 or len(anchors_P4) == 0:
        return torch.full((len(anchors_P4),), UNMATCHED, device=anchors_P4.device)
    iou_KP = box_iou(boxes_K4, anchors_P4)
    best_P, object_P = iou_KP.max(dim=0)
    matched_P = torch.where(best_P < low, UNMATCHED, torch.where(best_P < high, IGNORED, object_P))
    if keep_best:
        is_best_P = (iou_KP == iou_KP.amax(dim=1, keepdim=True)).any(dim=0)
        matched_P = torch.where(is_best_P, object_P, matched_P)
    return matched_P


def gather_matched_boxes(matched_P: Tensor, boxes_K4: Tensor, anchors_P4: Tensor) -> Tensor:
    """The matched objects' boxes (P, 4); an anchor without one gets some box of positive size."""
    return boxes_K4[matched_P.clamp(min=0)] if len(boxes_K4) else anchors_P4


def giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - GIoU of boxes (..., 4) xyxy, one by one: torchvision's number and gradient.

    torchvision picks the boxes that overlap, and for how many they are the host waits for the device.
    """
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    overlap = torch.where((sides > 0).all(dim=-1), sides[..., 0] * sides[..., 1], 0)
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    union = areas[0] + areas[1] - overlap
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = around[..., 0] * around[..., 1]
    return 1 - (overlap / (union + GIOU_EPS) - (hull - union) / (hull + GIOU_EPS))


def one_hot_targets(matched_P: Tensor, labels_K: Tensor, num_classes: int) -> Tensor:
    """(P, Q) float32: 1 at a matched anchor's class, else 0."""
    targets_PQ = torch.zeros(len(matched_P), num_classes, device=matched_P.device)
    if len(labels_K):
        labels_P = labels_K[matched_P.clamp(min=0)]
        targets_PQ.scatter_(1, labels_P[:, None], (matched_P >= 0).float()[:, None])
    return targets_PQ


def avg_factor(total: Tensor, least: float = 1.0) -> Tensor:
    """What a sum over the batch is divided by: the batch's total, such as its number of matches, at least 1.

    Under torch.distributed the total is averaged over the processes, so that after the mean of gradients N
    processes equal one process on the same images; every process must then call this.

    Args:
        total: of this process's part of the batch, in any type; float32 or float64 comes back.
        least: that the whole batch's total counts.
    """
    total = total.detach().to(torch.promote_types(total.dtype, torch.float32), copy=True)
    if not (distributed.is_available() and distributed.is_initialized()):
        return total.clamp(min=least)
    distributed.all_reduce(total)
    return total.clamp(min=least) / distributed.get_world_size()


def select_candidates(scores_PQ: Tensor, threshold: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``limit`` scores of one level above the threshold.

    Returns:
        scores (M,) falling, index of the anchor (M,), label (M,).
    """
    scores = scores_PQ.flatten()
    kept = torch.where(scores > threshold)[0]
    scores_M, order = scores[kept].topk(min(limit, len(kept)))
    kept = kept[order]
    return scores_M, kept // scores_PQ.shape[1], kept % scores_PQ.shape[1]


def best_scores(scores_NPQ: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``limit`` scores of each image: scores falling, places in P, labels in Q; each (N, M)."""
    _, places, classes = scores_NPQ.shape
    scores_NM, index_NM = scores_NPQ.flatten(1).topk(min(limit, places * classes))
    return scores_NM, torch.div(index_NM, classes, rounding_mode="floor"), index_NM % classes


def best_detections(
    boxes_M4: Tensor,
    scores_M: Tensor,
    labels_M: Tensor,
    nms_threshold: float | None,
    limit: int,
    size: Sequence[int],
    original_size: Sequence[int],
) -> Detections:
    """Suppression by class, the best ``limit``, boxes from network input to the original image's pixels.

    Without a threshold nothing is suppressed.
    """
    if nms_threshold is None:
        kept = scores_M.argsort(descending=True, stable=True)[:limit]
    else:
        kept = batched_nms(boxes_M4, scores_M, labels_M, nms_threshold)[:limit]
    boxes = in_original_pixels(boxes_M4[kept], size, original_size)
    return {"boxes": boxes, "labels": labels_M[kept], "scores": scores_M[kept]}


def suppressed(candidates: Candidates, nms_threshold: float, limit: int) -> Candidates:
    """The best ``limit`` candidates of one image after suppression by class; fillers have score 0."""
    boxes_M4, scores_M, labels_M = (part[0] for part in candidates[:3])
    apart_M4 = boxes_M4 + (labels_M * (boxes_M4.max() + 1))[:, None]  # boxes of two classes do not touch
    kept = nms(apart_M4, scores_M, nms_threshold)
    kept_M = torch.zeros_like(scores_M).scatter(0, kept, torch.ones_like(kept, dtype=scores_M.dtype))
    best_K, at_K = (scores_M * kept_M).topk(min(limit, len(scores_M)))
    return Candidates(boxes_M4[None, at_K], best_K[None], labels_M[None, at_K])


def in_original_pixels(boxes_M4: Tensor, size: Sequence[int], original_size: Sequence[int]) -> Tensor:
    """Boxes from network input, in which the image has ``size``, to pixels of the image as it was given."""
    ratio_y, ratio_x = original_size[0] / size[0], original_size[1] / size[1]
    return boxes_M4 * boxes_M4.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])


def clip_to_image(boxes_M4: Tensor, size: Sequence[int] | Tensor) -> Tensor:
    """Boxes within an image of (height, width); in a graph the size is a tensor (2,)."""
    if isinstance(size, Tensor):
        return boxes_M4.clamp(min=0).minimum(size.flip(0).repeat(2))
    return clip_boxes_to_image(boxes_M4, (size[0], size[1]))


def region_pool(strides: Iterable[int], side: int, convention: Convention) -> nn.Module:
    """What :func:`pool_regions` calls: torchvision's way or MMDetection's."""
    names = [str(stride) for stride in strides]
    if convention == "torchvision":
        return MultiScaleRoIAlign(names, output_size=side, sampling_ratio=2)
    return AlignedRoIAlign(names, side)


class AlignedRoIAlign(nn.Module):
    """MMDetection's way to pool regions: aligned to the centers of the map's cells, and sampled as finely.

    torchvision's ``MultiScaleRoIAlign``, which is called alike, is half a cell off and takes 2×2 samples in
    each cell of the output.
    """

    def __init__(self, strides: Sequence[str], side: int) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.side = side

    def forward(self, maps: Mapping[str, Tensor], regions: list[Tensor], sizes: object) -> Tensor:
        rois_R5 = convert_boxes_to_roi_format(regions)
        level_R = self.levels(rois_R5)
        first = maps[self.strides[0]]
        pooled_RCSS = first.new_zeros(len(rois_R5), first.shape[1], self.side, self.side)
        for level, stride in enumerate(self.strides):
            at = torch.where(level_R == level)[0]
            pooled = roi_align(
                maps[stride], rois_R5[at], self.side, 1 / int(stride), sampling_ratio=0, aligned=True
            )
            pooled_RCSS = pooled_RCSS.index_copy(0, at, pooled.to(first.dtype))
        return pooled_RCSS

    def levels(self, rois_R5: Tensor) -> Tensor:
        """(R,): a region is for the level of a fourteenth of its side, rounded down: 224 pixels, stride 16."""
        side_R = (rois_R5[:, 3:] - rois_R5[:, 1:3]).prod(dim=1).sqrt()
        level_R = torch.log2(side_R / (14 * int(self.strides[0])) + 1e-6)
        return level_R.floor().clamp(0, len(self.strides) - 1)


def pool_regions(pool: nn.Module, pyramid: Pyramid, regions: list[Tensor], batch: Batch) -> Tensor:
    """The pyramid within regions, each from the level that fits its size: (R, C, side, side).

    Args:
        pool: over levels that are named by their strides (:func:`region_pool`).
        pyramid, batch: of one detector.
        regions: per image (R_n, 4) xyxy in network input.
    """
    # The padded size, of which every level is an exact fraction, tells the pooling each level's stride.
    maps = {str(stride): x for stride, x in pyramid.items()}
    if torch.compiler.is_exporting():
        return _pool_all_levels(pool, maps, regions)
    return pool(maps, regions, [batch.padded_size] * len(regions))


def _pool_all_levels(pool: nn.Module, maps: Mapping[str, Tensor], regions: list[Tensor]) -> Tensor:
    """The same for a graph: how many regions a level has must change no shape, so each is pooled from all."""
    rois_R5 = convert_boxes_to_roi_format(regions)
    if isinstance(pool, AlignedRoIAlign):
        strides, level_R = pool.strides, pool.levels(rois_R5)
        side, samples, aligned = pool.side, 0, True
    else:
        assert isinstance(pool, MultiScaleRoIAlign)
        strides = tuple(pool.featmap_names)
        powers = [int(stride).bit_length() - 1 for stride in strides]
        level_R = LevelMapper(powers[0], powers[-1], pool.canonical_scale, pool.canonical_level)(regions)
        side, samples, aligned = pool.output_size[0], pool.sampling_ratio, False
    pooled_RCSS = rois_R5.new_zeros(())
    for level, stride in enumerate(strides):
        here = roi_align(maps[stride], rois_R5, side, 1 / int(stride), samples, aligned)
        pooled_RCSS = torch.where((level_R == level)[:, None, None, None], here, pooled_RCSS)
    return pooled_RCSS


def square_cells(strides: Sequence[int], scale: int = 1) -> AnchorGenerator:
    """One square to each cell of a level, its side ``scale`` times the stride."""
    return AnchorGenerator(tuple((scale * stride,) for stride in strides), ((1.0,),) * len(strides))
