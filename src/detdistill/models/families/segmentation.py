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

from detdistill.data.records import UNLABELED
from detdistill.errors import UserError
from detdistill.models.base import (
    Batch,
    Detections,
    HeadOutputs,
    Preprocess,
    Pyramid,
    SegmentationOutputs,
    Segmenter,
    TappedPyramid,
)
from detdistill.models.layers.backbones import Backbone, offered_strides
from detdistill.models.layers.heads import avg_factor
from detdistill.recipe.models import DeepLabV3Config, PSPNetConfig, SegmenterConfig

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

    def forward(self, x_NCHW: Tensor, aux_NCHW: Tensor | None) -> SegmentationOutputs:
        return SegmentationOutputs(
            self.cls(self.dropout(x_NCHW)),
            None if aux_NCHW is None else self.aux_cls(self.dropout(self.aux(aux_NCHW))),
        )


class EncoderDecoder(Segmenter):
    """The five steps of PSPNet and DeepLabV3; build it with :func:`pspnet` or :func:`deeplabv3`.

    The pyramid has one level, {8: the last map before the classifier}.

    Losses: ``cross_entropy`` and, 0.4 times, ``cross_entropy_aux``, of logits resized to network input, summed
    over the batch's labeled pixels and divided by their number (at least 1). Under torch.distributed that
    number is averaged over the processes, so that after the mean of gradients N processes equal one process on
    the same images; every process must then call ``losses``.

    Attributes:
        window: where images are larger than its side, in ``answer`` they are looked at window by window, and
            the logits of windows that overlap are averaged; None looks at them whole.
    """

    def __init__(
        self,
        config: SegmenterConfig,
        classes: Sequence[str],
        backbone: Backbone,
        neck: nn.Module,
    ) -> None:
        super().__init__()
        if len(classes) > UNLABELED:
            raise UserError(
                f"{len(classes)} classes: label maps hold {UNLABELED}; keep fewer with data.classes"
            )
        self.family = config.family
        self.backbone = backbone
        self.neck = neck
        self.head = SegmentationHead(config.channels, next(iter(backbone.channels.values())), len(classes))
        self.classes = tuple(classes)
        self.preprocessor = Preprocess(mean=backbone.mean, std=backbone.std, divisor=OUTPUT_STRIDE)
        self.pyramid_channels = {OUTPUT_STRIDE: config.channels}
        self.window = config.window

    def forward_features(self, batch: Batch) -> Pyramid:
        earlier_NCHW, last_NCHW = self.backbone(batch.images_N3HW).values()
        pyramid = TappedPyramid({OUTPUT_STRIDE: self.neck(last_NCHW)})
        pyramid.output = earlier_NCHW if self.training else None
        return pyramid

    def forward_head(self, pyramid: Pyramid, batch: Batch) -> SegmentationOutputs:
        aux_NCHW = pyramid.output if isinstance(pyramid, TappedPyramid) else None
        return self.head(pyramid[OUTPUT_STRIDE], aux_NCHW)

    def losses(self, outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(outputs, SegmentationOutputs)
        return pixel_losses(outputs, batch)

    def decode(self, outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(outputs, SegmentationOutputs)
        return label_maps(outputs, batch)

    def predict(self, batch: Batch) -> list[Detections]:
        if self.window is None or max(batch.padded_size) <= self.window[0]:
            return super().predict(batch)
        return self.decode(SegmentationOutputs(self._logits_by_window(batch, *self.window)), batch)

    def _logits_by_window(self, batch: Batch, side: int, stride: int) -> Tensor:
        """(N, Q, H, W) at the padded size: of each pixel the mean over the windows that see it."""
        height, width = batch.padded_size
        total_NQHW = batch.images_N3HW.new_zeros(len(batch.sizes), len(self.classes), height, width)
        views_HW = total_NQHW.new_zeros(height, width)
        for top, left in product(_starts(height, side, stride), _starts(width, side, stride)):
            seen = (..., slice(top, top + side), slice(left, left + side))
            part = replace(batch, images_N3HW=batch.images_N3HW[seen], targets=None)
            outputs = self.forward_head(self.forward_features(part), part)
            total_NQHW[seen] += resize_logits(outputs.logits_NQHW, part.padded_size)
            views_HW[seen] += 1
        return total_NQHW / views_HW


def pixel_losses(outputs: SegmentationOutputs, batch: Batch) -> dict[str, Tensor]:
    """The losses of :class:`EncoderDecoder`, of any such outputs."""
    labels_NHW = batch.semantic_labels()
    count = avg_factor((labels_NHW != UNLABELED).sum())
    losses = {"cross_entropy": _cross_entropy(outputs.logits_NQHW, labels_NHW) / count}
    if outputs.aux_NQHW is not None:
        losses["cross_entropy_aux"] = AUX_WEIGHT * _cross_entropy(outputs.aux_NQHW, labels_NHW) / count
    return losses


def label_maps(outputs: SegmentationOutputs, batch: Batch) -> list[Detections]:
    """The likeliest class of each pixel of the original images."""
    maps = []
    for logits_QHW, size, original in zip(outputs.logits_NQHW, batch.sizes, batch.original_sizes, strict=True):
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
    """Summed over the labeled pixels, in float32."""
    with torch.autocast(logits_NQHW.device.type, enabled=False):
        logits_NQHW = resize_logits(logits_NQHW, labels_NHW.shape[-2:])
        return F.cross_entropy(logits_NQHW, labels_NHW, ignore_index=UNLABELED, reduction="sum")


def build_pspnet(config: PSPNetConfig, classes: Sequence[str]) -> EncoderDecoder:
    """PSPNet: means over grids of the map of stride 8. Published width: 512, over ResNet-18 128."""
    body = _dilated(config)
    neck = PyramidPooling(list(body.channels.values())[-1], config.channels)
    return EncoderDecoder(config, classes, body, neck)


def build_deeplabv3(config: DeepLabV3Config, classes: Sequence[str]) -> EncoderDecoder:
    """DeepLabV3: convolutions of several dilations on the map of stride 8.

    Published width: 256; 512 in MMSegmentation and for the IMA paper's teacher.
    """
    body = _dilated(config)
    neck = AtrousPooling(list(body.channels.values())[-1], config.channels)
    return EncoderDecoder(config, classes, body, neck)


def _dilated(config: SegmenterConfig) -> Backbone:
    """The backbone, tapped at its last two stages."""
    return Backbone.of(config, sorted(set(offered_strides(config.backbone)))[-2:], OUTPUT_STRIDE)
