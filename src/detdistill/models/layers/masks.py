"""The mask branch of two-stage detectors (Mask R-CNN, He et al. 2017): a small picture of each region's object.

Shape legend: M regions over the whole batch, K objects or detections of an image, Q classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from detdistill.models.base import Batch, Detections, Pyramid
from detdistill.models.layers.heads import pool_regions, region_pool, tower
from detdistill.recipe import Convention

POOLED = 14  # cells of a pooled region
SIDE = 2 * POOLED  # pixels of a mask
DEPTH = 4


class MaskHead(nn.Module):
    """Four 3×3 convolutions, a deconvolution that doubles the side, and a mask for each of Q + 1 classes.

    The background, class 0, has a mask, too, that nothing learns from: torchvision's layout.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.tower = tower(channels, DEPTH, group_norm=False)
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.mask = nn.Conv2d(channels, num_classes + 1, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                assert layer.bias is not None
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, pooled_MC14: Tensor) -> Tensor:
        return self.mask(F.relu(self.up(self.tower(pooled_MC14))))


class MaskBranch(nn.Module):
    """Mask heads over regions of the pyramid: one, or one for each stage of a cascade.

    Args:
        strides: levels that regions are pooled from.
        channels: of the pyramid and the heads.
        num_classes: without the background.
        stages: number of heads.
        convention: whose way regions are pooled in.
    """

    def __init__(
        self,
        strides: Iterable[int],
        channels: int,
        num_classes: int,
        stages: int = 1,
        convention: Convention = "torchvision",
    ) -> None:
        super().__init__()
        self.pool = region_pool(strides, POOLED, convention)
        self.heads = nn.ModuleList(MaskHead(channels, num_classes) for _ in range(stages))

    def logits(
        self, stage: int, pyramid: Pyramid, regions: list[Tensor], labels_M: Tensor, batch: Batch
    ) -> Tensor:
        """One head's masks of regions, each for one class.

        Args:
            stage: which head.
            pyramid, batch: of the detector.
            regions: per image (M_n, 4) xyxy in network input.
            labels_M: the class of each, 0 being the background.

        Returns:
            (M, 28, 28).
        """
        return _of_class(self.heads[stage](pool_regions(self.pool, pyramid, regions, batch)), labels_M)

    def probabilities(self, pyramid: Pyramid, found: Sequence[Detections], batch: Batch) -> list[Tensor]:
        """The masks of detections, the mean of all heads'.

        Args:
            pyramid, batch: of the detector.
            found: of each image, boxes in network input and labels from 0.

        Returns:
            of each image (K, 28, 28) float32 in [0, 1]: of its boxes.
        """
        pooled_MC14 = pool_regions(self.pool, pyramid, [one["boxes"] for one in found], batch)
        labels_M = torch.cat([one["labels"] for one in found]) + 1
        masks = [_of_class(head(pooled_MC14), labels_M).float().sigmoid() for head in self.heads]
        return list(torch.stack(masks).mean(dim=0).split([len(one["boxes"]) for one in found]))


def _of_class(masks_MQ28: Tensor, labels_M: Tensor) -> Tensor:
    return masks_MQ28[torch.arange(len(labels_M), device=labels_M.device), labels_M]


def paste_masks(masks_KSS: Tensor, boxes_K4: Tensor, size: tuple[int, int], convention: Convention) -> Tensor:
    """Masks where their boxes are, (K, 1, height, width) in [0, 1], and 0 elsewhere.

    torchvision stretches a mask, with a rim of one cell, to a box of whole pixels; MMDetection looks up each
    pixel's center in the mask.

    Args:
        masks_KSS: of the boxes.
        boxes_K4: xyxy in pixels of the image.
        size: (height, width) of the image.
        convention: whose way.
    """
    if convention == "torchvision":
        return paste_masks_in_image(masks_KSS[:, None], boxes_K4, size)
    height, width = size
    y_H = torch.arange(height, device=boxes_K4.device) + 0.5
    x_W = torch.arange(width, device=boxes_K4.device) + 0.5
    pasted = [masks_KSS.new_zeros(0, 1, height, width)]
    for mask_SS, (left, top, right, bottom) in zip(masks_KSS, boxes_K4, strict=True):
        place_HW2 = torch.stack(
            torch.meshgrid((x_W - left) / (right - left), (y_H - top) / (bottom - top), indexing="xy"), dim=2
        )
        pasted.append(F.grid_sample(mask_SS[None, None], 2 * place_HW2[None] - 1, align_corners=False))
    return torch.cat(pasted)


def crop_masks(masks_KHW: Tensor, regions_M4: Tensor, objects_M: Tensor) -> Tensor:
    """What a region should say: the mask of its object within it.

    Args:
        masks_KHW: the objects' masks in network input.
        regions_M4: xyxy in network input.
        objects_M: index of each region's object.

    Returns:
        (M, 28, 28) float32: the share of the object in each cell, in [0, 1].
    """
    rois_M5 = torch.cat([objects_M[:, None].to(regions_M4), regions_M4], dim=1)
    return roi_align(masks_KHW[:, None].to(regions_M4), rois_M5, SIDE).squeeze(1)


def mask_loss(logits_M: Tensor, targets_M: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over the pixels of all masks; 0 where there are none."""
    total = F.binary_cross_entropy_with_logits(logits_M.float(), targets_M, reduction="sum")
    return total / max(1, targets_M.numel())
