"""ATSS (Zhang et al., CVPR 2020): which anchors answer for an object, by a threshold of the object's own.

Shape legend: L levels, P anchors of all levels, K objects, M candidates of an object.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from detdistill.models.layers.heads import UNMATCHED

TOPK = 9  # candidates of a level
INSIDE = 0.01  # pixels that a positive anchor's center keeps from the object's sides


def atss_assign(boxes_K4: Tensor, anchors: Sequence[Tensor], topk: int = TOPK) -> Tensor:
    """Which object each anchor answers for.

    An object's candidates are, in each level, the ``topk`` anchors whose centers are nearest to its own. Those
    whose IoU reaches the threshold (:func:`atss_thresholds`) and whose center lies inside answer for it; an
    anchor of several objects for that of the highest IoU.

    Args:
        boxes_K4: objects; K may be 0.
        anchors: of each level (P_l, 4).
        topk: candidates of a level.

    Returns:
        (P,) int64: index of the object or UNMATCHED. No host synchronization.
    """
    anchors_P4 = torch.cat(list(anchors))
    if len(boxes_K4) == 0:
        return torch.full((len(anchors_P4),), UNMATCHED, device=anchors_P4.device)
    iou_KP = box_iou(boxes_K4, anchors_P4)
    candidates_KM = nearest_anchors(boxes_K4, anchors, topk)
    positive_KP = torch.zeros_like(iou_KP, dtype=torch.bool).scatter(1, candidates_KM, True)
    positive_KP &= iou_KP >= atss_thresholds(iou_KP, candidates_KM)[:, None]
    positive_KP &= center_depths(boxes_K4, anchors_P4) > INSIDE
    best_P, object_P = torch.where(positive_KP, iou_KP, -1.0).max(dim=0)
    return torch.where(best_P < 0, UNMATCHED, object_P)


def atss_thresholds(iou_KP: Tensor, candidates_KM: Tensor) -> Tensor:
    """(K,) mean plus standard deviation of the candidates' IoU with their object."""
    iou_KM = iou_KP.gather(1, candidates_KM)
    mean_K1 = iou_KM.mean(dim=1, keepdim=True)
    variance_K = (iou_KM - mean_K1).square().sum(dim=1) / max(1, iou_KM.shape[1] - 1)
    return mean_K1.squeeze(1) + variance_K.sqrt()


def nearest_anchors(boxes_K4: Tensor, anchors: Sequence[Tensor], topk: int = TOPK) -> Tensor:
    """(K, M) indices of the ``topk`` anchors of each level (all, where it has fewer) nearest to each object."""
    center_K12 = centers(boxes_K4)[:, None]
    found, start = [], 0
    for anchors_P4 in anchors:
        distance_KP = (centers(anchors_P4) - center_K12).square().sum(dim=2)
        nearest_KM = distance_KP.topk(min(topk, len(anchors_P4)), dim=1, largest=False).indices
        found.append(nearest_KM + start)
        start += len(anchors_P4)
    return torch.cat(found, dim=1)


def center_depths(boxes_K4: Tensor, anchors_P4: Tensor) -> Tensor:
    """(K, P) how far each anchor's center is from the nearest side of each box; negative outside it."""
    point_P2 = centers(anchors_P4)
    inner_KP2 = torch.minimum(point_P2 - boxes_K4[:, None, :2], boxes_K4[:, None, 2:] - point_P2)
    return inner_KP2.amin(dim=2)


def centers(boxes: Tensor) -> Tensor:
    """(..., 2) of boxes (..., 4)."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2
