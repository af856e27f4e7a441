"""Where the objects are on a feature map. Maps cover the padded input, so boxes are mapped by the padded size.

Shape legend: N images, K objects of an image, H W rows and columns of the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detdistill.models.base import Batch
from detdistill.models.preprocess import resize_labels

CANONICAL_SIDE, CANONICAL_STRIDE = 224.0, 16  # FPN (Lin et al. 2017), Eq. 1: ImageNet's side is for stride 16


def boxes_in_cells(batch: Batch, map_NCHW: Tensor) -> list[Tensor]:
    """Every image's objects as (K, 4) float32 xyxy in cells of the map; none where there are no targets."""
    if batch.targets is None:
        return [map_NCHW.new_zeros(0, 4, dtype=torch.float32) for _ in batch.sizes]
    return [in_cells(target["boxes"].float(), batch, map_NCHW) for target in batch.targets]


def in_cells(boxes_K4: Tensor, batch: Batch, map_NCHW: Tensor) -> Tensor:
    """Boxes (K, 4) xyxy from network input to cells of the map."""
    height, width = batch.padded_size
    y, x = map_NCHW.shape[-2] / height, map_NCHW.shape[-1] / width
    # four scalar products: a tensor of the ratios would have to be copied to the device at every step
    return torch.stack([boxes_K4[:, i] * scale for i, scale in enumerate((x, y, x, y))], dim=1)


def from_input_to_input(boxes_K4: Tensor, size: Sequence[int], other: Sequence[int]) -> Tensor:
    """Boxes (K, 4) xyxy of an image that has ``size`` in their network input, in one where it has ``other``."""
    if tuple(size) == tuple(other):
        return boxes_K4
    y, x = other[0] / size[0], other[1] / size[1]
    return torch.stack([boxes_K4[:, i] * scale for i, scale in enumerate((x, y, x, y))], dim=1)


def touched_cells(boxes_K4: Tensor, height: int, width: int) -> Tensor:
    """(K, H, W) bool: the cells that each box (in cells) touches, never fewer than one."""
    x = torch.arange(width, device=boxes_K4.device)
    y = torch.arange(height, device=boxes_K4.device)
    left, top = (boxes_K4[:, i].floor().clamp(0, side - 1) for i, side in ((0, width), (1, height)))
    right = boxes_K4[:, 2].ceil().maximum(left + 1)
    bottom = boxes_K4[:, 3].ceil().maximum(top + 1)
    rows_KH = (y >= top[:, None]) & (y < bottom[:, None])
    columns_KW = (x >= left[:, None]) & (x < right[:, None])
    return rows_KH[:, :, None] & columns_KW[:, None, :]


def object_mask(batch: Batch, map_NCHW: Tensor) -> Tensor:
    """(N, H, W) bool: the cells that any object touches."""
    height, width = map_NCHW.shape[-2:]
    return torch.stack([
        touched_cells(boxes, height, width).any(dim=0) for boxes in boxes_in_cells(batch, map_NCHW)
    ])  # fmt: skip


def class_labels(batch: Batch, map_NCHW: Tensor) -> Tensor:
    """(N, H, W) int64 on the map: the class at each cell's center; 255 where none is, and in padding."""
    return resize_labels(batch.semantic_labels(), map_NCHW.shape[-2:]).long()


def valid_mask(batch: Batch, map_NCHW: Tensor) -> Tensor:
    """(N, H, W) bool: the cells that see a part of the image; the others see padding alone."""
    height, width = map_NCHW.shape[-2:]
    rows = torch.arange(height, device=map_NCHW.device)
    columns = torch.arange(width, device=map_NCHW.device)
    masks = []
    for h, w in batch.sizes:
        cells_h = math.ceil(h * height / batch.padded_size[0])
        cells_w = math.ceil(w * width / batch.padded_size[1])
        masks.append((rows < cells_h)[:, None] & (columns < cells_w)[None])
    return torch.stack(masks)


def stride_of_boxes(boxes_K4: Tensor, strides: Sequence[int]) -> Tensor:
    """(K,) the stride of the level each box (in network input) belongs to, by the rule of FPN (Eq. 1)."""
    area_K = (boxes_K4[:, 2] - boxes_K4[:, 0]) * (boxes_K4[:, 3] - boxes_K4[:, 1])
    wanted_K = math.log2(CANONICAL_STRIDE) + torch.log2(area_K.clamp(min=1e-6).sqrt() / CANONICAL_SIDE)
    # The small sum keeps a side of exactly 224 at its level whatever the rounding (as in torchvision).
    return 2 ** (wanted_K + 1e-6).floor().clamp(math.log2(min(strides)), math.log2(max(strides)))
