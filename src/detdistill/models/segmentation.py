"""Segmenters over a dilated backbone: PSPNet and DeepLabV3, with the auxiliary head of both.

- PSPNet (Zhao et al., "Pyramid Scene Parsing Network", 2017): the backbone's map is averaged over grids of
  1, 2, 3 and 6 cells a side (section 3.2).
- DeepLabV3 (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017): it is read by
  convolutions of several dilations and by its mean (section 3.3).

The last two stages of the backbone do not go below the output stride, 8; they are dilated instead. Widths are
as in MMSegmentation, whose models those of the IMA paper's Table 7 seem to be. For 19 classes, without the
auxiliary head: a PSPNet over ``resnet18`` with ``channels`` 128 has 12.62M parameters, 12.61M beside the norms'
(the paper's number); a DeepLabV3 over ``resnet101c`` with 512 has 84.74M (the paper's).

Shape legend: N images, C channels, H W rows and columns, Q classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from detdistill.config import UserError
from detdistill.data.records import UNLABELLED
from detdistill.models.backbones import Backbone, offered_strides
from detdistill.models.base import (
    Batch,
    Detections,
    Preprocess,
    Pyramid,
    Raw,
    SegmentationRaw,
    Segmenter,
    TappedPyramid,
    class_names,
)
from detdistill.models.heads import normaliser

OUTPUT_STRIDE = 8
DROPOUT = 0.1
AUX_WEIGHT = 0.4  # PSPNet, section 3.3
GRIDS = (1, 2, 3, 6)
DILATIONS = (12, 24, 36)  # for an output stride of 8

Window = tuple[int, int]
"""(side, stride) of the square windows in which a large image is looked at, in pixels of network input."""


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that takes its running statistics where a channel has one value: it has no variance then.

    The mean of a map, from a batch of one image, is such a value.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(x)


def conv(in_channels: int, channels: int, kernel: int, dilation: int = 1) -> Conv2dNormActivation:
    """Convolution, BatchNorm, ReLU; the map keeps its size."""
    return Conv2dNormActivation(in_channels, channels, kernel, dilation=dilation, norm_layer=BatchNorm)


class Pooled(nn.Sequential):
    """The means of a grid's cells, convolved, at the size of the map."""

    def __init__(self, in_channels: int, channels: int, grid: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(grid), conv(in_channels, channels, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.interpolate(super().forward(x_NCHW), x_NCHW.shape[-2:], mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """PSPNet's: the map beside its means over the grids, then a 3×3 convolution."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Pooled(in_channels, channels, grid) for grid in GRIDS)
        self.project = conv(in_channels + len(GRIDS) * channels, channels, 3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.project(torch.cat([x_NCHW, *(branch(x_NCHW) for branch in self.branches)], dim=1))


class AtrousPooling(nn.Module):
    """DeepLabV3's (ASPP): the map by a 1×1, by dilated 3×3 convolutions and by its mean, then a 3×3 one."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([
            Pooled(in_channels, channels, 1),
            conv(in_channels, channels, 1),
            *(conv(in_channels, channels, 3, dilation) for dilation in DILATIONS),
        ])  # fmt: skip
        self.project = conv(len(self.branches) * channels, channels, 3)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x_NCHW) for branch in self.branches], dim=1))


class SegmentationHead(nn.Module):
    """The classifier, and in training a small network that classifies from an earlier map."""

    def __init__(self, channels: int, aux_channels: int, num_classes: int) -> None:
        super().__init__()
        width = max(1, aux_channels // 4)
        self.dropout = nn.Dropout(DROPOUT)
        self.cls = nn.Conv2d(channels, num_classes, 1)
        self.aux = conv(aux_channels, width, 3)
        self.aux_cls = nn.Conv2d(width, num_classes, 1)

    def forward(self, x_NCHW: Tensor, aux_NCHW: Tensor | None) -> SegmentationRaw:
        return SegmentationRaw(
            self.cls(self.dropout(x_NCHW)),
            None if aux_NCHW is None else self.aux_cls(self.dropout(self.aux(aux_NCHW))),
        )


class EncoderDecoder(Segmenter):
    """The five steps of PSPNet and DeepLabV3; build it with :func:`pspnet` or :func:`deeplabv3`.

    The pyramid has one level, {8: the last map before the classifier}.

    Losses: ``cross_entropy`` and, 0.4 times, ``cross_entropy_aux``, of logits resized to network input, summed
    over the batch's labelled pixels and divided by their number (at least 1). Under torch.distributed that
    number is averaged over the processes, so that after the mean of gradients N processes equal one process on
    the same images; every process must then call ``losses``.

    Attributes:
        window: where images are larger than its side, in ``answer`` they are looked at window by window, and
            the logits of windows that overlap are averaged; None looks at them whole.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module,
        head: SegmentationHead,
        classes: Sequence[str],
        preprocess: Preprocess,
        *,
        window: Window | None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.classes = tuple(classes)
        self.preprocessor = preprocess
        self.pyramid_channels = {OUTPUT_STRIDE: head.cls.in_channels}
        self.window = window

    def pyramid(self, batch: Batch) -> Pyramid:
        earlier_NCHW, last_NCHW = self.backbone(batch.images_N3HW).values()
        pyramid = TappedPyramid({OUTPUT_STRIDE: self.neck(last_NCHW)})
        pyramid.output = earlier_NCHW if self.training else None
        return pyramid

    def predict(self, pyramid: Pyramid, batch: Batch) -> SegmentationRaw:
        aux_NCHW = pyramid.output if isinstance(pyramid, TappedPyramid) else None
        return self.head(pyramid[OUTPUT_STRIDE], aux_NCHW)

    def losses(self, raw: Raw, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(raw, SegmentationRaw)
        return pixel_losses(raw, batch)

    def decode(self, raw: Raw, batch: Batch) -> list[Detections]:
        assert isinstance(raw, SegmentationRaw)
        return label_maps(raw, batch)

    def answer(self, batch: Batch) -> list[Detections]:
        if self.window is None or max(batch.padded_size) <= self.window[0]:
            return super().answer(batch)
        return self.decode(SegmentationRaw(self._logits_by_window(batch, *self.window)), batch)

    def _logits_by_window(self, batch: Batch, side: int, stride: int) -> Tensor:
        """(N, Q, H, W) at the padded size: of each pixel the mean over the windows that see it."""
        height, width = batch.padded_size
        total_NQHW = batch.images_N3HW.new_zeros(len(batch.sizes), len(self.classes), height, width)
        views_HW = total_NQHW.new_zeros(height, width)
        for top, left in product(_starts(height, side, stride), _starts(width, side, stride)):
            seen = (..., slice(top, top + side), slice(left, left + side))
            part = replace(batch, images_N3HW=batch.images_N3HW[seen], targets=None)
            raw = self.predict(self.pyramid(part), part)
            total_NQHW[seen] += resize_logits(raw.logits_NQHW, part.padded_size)
            views_HW[seen] += 1
        return total_NQHW / views_HW


def pixel_losses(raw: SegmentationRaw, batch: Batch) -> dict[str, Tensor]:
    """The losses of :class:`EncoderDecoder`, of any such outputs."""
    labels_NHW = batch.semantic_labels()
    count = normaliser((labels_NHW != UNLABELLED).sum())
    losses = {"cross_entropy": _cross_entropy(raw.logits_NQHW, labels_NHW) / count}
    if raw.aux_NQHW is not None:
        losses["cross_entropy_aux"] = AUX_WEIGHT * _cross_entropy(raw.aux_NQHW, labels_NHW) / count
    return losses


def label_maps(raw: SegmentationRaw, batch: Batch) -> list[Detections]:
    """The likeliest class of each pixel of the original images."""
    maps = []
    for logits_QHW, size, original in zip(raw.logits_NQHW, batch.sizes, batch.original_sizes, strict=True):
        logits_QHW = resize_logits(logits_QHW[None], batch.padded_size)[0, :, : size[0], : size[1]]
        maps.append({"semantic": resize_logits(logits_QHW[None], original)[0].argmax(dim=0)})
    return maps


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin along a side: a stride apart, the last one at the end."""
    last = max(0, length - side)
    return [*range(0, last, stride), last]


def resize_logits(x_NQHW: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, in float32."""
    if x_NQHW.shape[-2:] == torch.Size(size):
        return x_NQHW.float()
    return F.interpolate(x_NQHW.float(), tuple(size), mode="bilinear", align_corners=False)


def _cross_entropy(logits_NQHW: Tensor, labels_NHW: Tensor) -> Tensor:
    """Summed over the labelled pixels, in float32."""
    with torch.autocast(logits_NQHW.device.type, enabled=False):
        logits_NQHW = resize_logits(logits_NQHW, labels_NHW.shape[-2:])
        return F.cross_entropy(logits_NQHW, labels_NHW, ignore_index=UNLABELLED, reduction="sum")


def pspnet(
    backbone: str = "resnet50",
    num_classes: int = 19,
    *,
    classes: Sequence[str] | None = None,
    channels: int = 256,
    norm: str = "batch",
    freeze_stages: int = 0,
    stride_in_1x1: bool = False,
    pretrained_backbone: bool = False,
    preprocess: Preprocess | None = None,
    window: Window | None = None,
) -> EncoderDecoder:
    """PSPNet, a segmenter: every pixel gets a class, with means over grids of the map (stride 8).

    Args:
        backbone: timm model that can be dilated to an output stride of 8: ResNets, RegNets, EfficientNets,
            MobileNets, ConvNeXts, …
        num_classes: number of classes, at most 255.
        classes: their names (``num_classes`` is then their number); "0", "1", … when not given.
        channels: width of the decoder. Published: 512, over ResNet-18 128.
        norm, freeze_stages, stride_in_1x1, pretrained_backbone: as in
            :class:`~detdistill.models.backbones.Backbone`.
        preprocess: input convention; images as they come, with the backbone's mean and std, when not given.
        window: (side, stride): in evaluation look at large images by windows; None looks at them whole.

    Raises:
        UserError: as :class:`~detdistill.models.backbones.Backbone` does; too many classes.
    """
    body = _dilated(backbone, norm, freeze_stages, stride_in_1x1, pretrained_backbone)
    neck = PyramidPooling(list(body.channels.values())[-1], channels)
    return _segmenter("pspnet", body, neck, channels, _names(classes, num_classes), preprocess, window)


def deeplabv3(
    backbone: str = "resnet50",
    num_classes: int = 19,
    *,
    classes: Sequence[str] | None = None,
    channels: int = 256,
    norm: str = "batch",
    freeze_stages: int = 0,
    stride_in_1x1: bool = False,
    pretrained_backbone: bool = False,
    preprocess: Preprocess | None = None,
    window: Window | None = None,
) -> EncoderDecoder:
    """DeepLabV3, a segmenter: every pixel gets a class, by convolutions of several dilations (stride 8).

    Args:
        channels: width of the decoder. Published: 256; 512 in MMSegmentation and for the IMA paper's teacher.
        backbone, num_classes, classes, norm, freeze_stages, stride_in_1x1, pretrained_backbone, preprocess,
            window: as of :func:`pspnet`.

    Raises:
        UserError: as :func:`pspnet` does.
    """
    body = _dilated(backbone, norm, freeze_stages, stride_in_1x1, pretrained_backbone)
    neck = AtrousPooling(list(body.channels.values())[-1], channels)
    return _segmenter("deeplabv3", body, neck, channels, _names(classes, num_classes), preprocess, window)


def _dilated(name: str, norm: str, freeze_stages: int, stride_in_1x1: bool, pretrained: bool) -> Backbone:
    """The backbone, tapped at its last two stages."""
    return Backbone(
        name, sorted(set(offered_strides(name)))[-2:],
        pretrained=pretrained, norm=norm, freeze_stages=freeze_stages, stride_in_1x1=stride_in_1x1,
        output_stride=OUTPUT_STRIDE,
    )  # fmt: skip


def _names(classes: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    names = class_names(classes, num_classes)
    if len(names) > UNLABELLED:
        raise UserError(f"{len(names)} classes: label maps hold {UNLABELLED}; keep fewer with data.classes")
    return names


def _segmenter(
    family: str,
    body: Backbone,
    neck: nn.Module,
    channels: int,
    names: Sequence[str],
    preprocess: Preprocess | None,
    window: Window | None,
) -> EncoderDecoder:
    if window is not None and not 0 < window[1] <= window[0]:
        raise UserError(f"window is {list(window)}; give (side, stride) in pixels, the stride no larger")
    head = SegmentationHead(channels, next(iter(body.channels.values())), len(names))
    preprocess = preprocess or Preprocess(mean=body.mean, std=body.std, divisor=OUTPUT_STRIDE)
    segmenter = EncoderDecoder(body, neck, head, names, preprocess, window=window)
    segmenter.family = family
    return segmenter
