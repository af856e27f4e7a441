"""Where the teacher's cells lie on the student's maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from detdistill.models.base import Batch


class Alignment:
    """Lays the student's maps over the teacher's: cell over cell that sees the same part of the image.

    Both maps cover their padded inputs from the top left corner. Where each image has the same share of both,
    plain resizing does it, and nothing at all where the maps are of one size. Else, since paddings and rounded
    sizes differ from image to image, each has a scale of its own: with w the image's width in network input, W
    that of the padded input and u in [0, 1] across the teacher's map, the student's map is read at
    u · (w_s / W_s) / (w_t / W_t), and so for rows. Beyond its border, where the teacher sees padding, its last
    cell counts on.

    Args:
        student, teacher: the inputs of one step.
    """

    def __init__(self, student: Batch, teacher: Batch) -> None:
        self._ratios_N2 = None
        if student is teacher:
            return
        (height, width), (height_t, width_t) = student.padded_size, teacher.padded_size
        sizes = list(zip(student.sizes, teacher.sizes, strict=True))
        if any(h * height_t != h_t * height or w * width_t != w_t * width for (h, w), (h_t, w_t) in sizes):
            ratios = [
                (h * height_t / (h_t * height), w * width_t / (w_t * width)) for (h, w), (h_t, w_t) in sizes
            ]
            self._ratios_N2 = _to_device(torch.tensor(ratios), student.images_N3HW.device)

    def __call__(self, student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
        """The student's map (N, C, ., .) on the cells of the teacher's (N, ., H, W)."""
        if self._ratios_N2 is None:
            return resize_like(student_NCHW, teacher_NCHW)
        return read_at(student_NCHW, teacher_NCHW.shape[-2:], self._ratios_N2)


def read_at(x_NCHW: Tensor, size: Sequence[int], ratios_N2: Tensor) -> Tensor:
    """(N, C, *size), bilinear: a cell centered at u of the new map's side is read at ratio · u of x's."""
    # By hand: affine_grid multiplies matrices, which an autocast rounds to a thirty-second of a cell.
    dtype = torch.promote_types(x_NCHW.dtype, torch.float32)
    y_NH, x_NW = (
        2 * ratios_N2[:, i, None].to(dtype) * _centers(side, ratios_N2.device, dtype) - 1
        for i, side in enumerate(size)
    )
    grid_NHW2 = torch.stack(torch.broadcast_tensors(x_NW[:, None, :], y_NH[:, :, None]), dim=-1)
    with torch.autocast(x_NCHW.device.type, enabled=False):
        found = F.grid_sample(
            x_NCHW.to(dtype), grid_NHW2, mode="bilinear", padding_mode="border", align_corners=False
        )
    return found.to(x_NCHW.dtype)


def _centers(cells: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(cells,) where the cells' centers are, in [0, 1]."""
    return (torch.arange(cells, device=device, dtype=dtype) + 0.5) / cells


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copied from pinned memory, for which the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def resize_like(x_NCHW: Tensor, like_NCHW: Tensor) -> Tensor:
    """Bilinear, where heights and widths differ."""
    if x_NCHW.shape[-2:] == like_NCHW.shape[-2:]:
        return x_NCHW
    return F.interpolate(x_NCHW, size=like_NCHW.shape[-2:], mode="bilinear", align_corners=False)
