"""Backbones and the feature pyramid: images to ``{stride: map}``."""

from __future__ import annotations

import difflib
import functools
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import timm
import torch
from timm.layers import freeze_batch_norm_2d
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from detdistill.errors import UserError
from detdistill.models.base import Pyramid
from detdistill.recipe.models import NetworkConfig

HUB_TIMEOUT_S = 3.0


class Backbone(nn.Module):
    """Any timm model that offers feature maps, tapped at the wanted strides.

    Args:
        name: a name that ``timm.create_model`` knows.
        strides: the strides to return; each must be offered by the model.
        pretrained: let timm download the ImageNet weights of this name.
        norm: ``batch`` (BatchNorm learns) or ``frozen`` (its statistics and affine are constants).
        freeze_stages: so many of timm's feature stages, counted from the input, do not learn, and their
            BatchNorm and dropout stay in evaluation mode. For a ResNet 1 is the stem, 2 the stem and layer1
            (torchvision's ``trainable_backbone_layers=3``), 5 everything.
        stride_in_1x1: the stride of a ResNet's bottleneck is in its first 1×1 convolution, as in Caffe's models
            and in the paper, not in its 3×3 one. The weights have the same names and shapes either way.
        output_stride: stages below it are dilated instead of strided, as segmenters want it. Maps are still
            called by the strides that they have without.

    Attributes:
        channels: ``{stride: channels}`` of what ``forward`` returns.
        mean, std: the input normalization that the model's published weights were trained with.

    Raises:
        UserError: unknown name, no feature maps, a stride that is not offered, weights that cannot be had, no
            bottlenecks where their stride should move, no dilation.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(
        self,
        name: str,
        strides: Sequence[int],
        *,
        pretrained: bool = False,
        norm: str = "batch",
        freeze_stages: int = 0,
        stride_in_1x1: bool = False,
        output_stride: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        offered = offered_strides(name)
        dilation = {} if output_stride is None else _dilation(name, output_stride)
        absent = [stride for stride in strides if stride not in offered]
        if absent:
            raise UserError(
                f"backbone {name!r} offers strides {list(offered)}, not {absent}: "
                f"change `strides` or the backbone"
            )
        # The deepest map of a stride: a plain transformer offers the same one after every block.
        indices = [len(offered) - 1 - offered[::-1].index(stride) for stride in strides]
        try:
            with _quick_refusal() if pretrained else nullcontext():
                body: Any = timm.create_model(
                    name, features_only=True, out_indices=indices, pretrained=pretrained, **dilation
                )
        except Exception as error:
            if not pretrained:
                raise
            raise UserError(
                f"backbone_weights: the ImageNet weights of {name!r} are not in the local cache and cannot be "
                f"downloaded ({type(error).__name__}); give a local file in timm's layout, or leave "
                "backbone_weights out"
            ) from error
        if stride_in_1x1:
            _move_strides(body, name)
        self.body: nn.Module = freeze_batch_norm_2d(body) if norm == "frozen" else body
        self.channels = dict(zip(strides, body.feature_info.channels(), strict=True))
        self.mean, self.std = tuple(body.pretrained_cfg["mean"]), tuple(body.pretrained_cfg["std"])
        self._channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
        stages = [info["module"] for info in body.feature_info.info]
        self._frozen = self._up_to(stages[min(freeze_stages, len(stages)) - 1]) if freeze_stages else []
        # timm builds some families whole: what lies beyond the last tap gets no gradient, and DDP would wait.
        used = self._up_to(stages[indices[-1]])
        for module_name, module in self.body.named_modules():
            if module_name in self._frozen or module_name not in used:
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)

    @classmethod
    def of(cls, config: NetworkConfig, strides: Sequence[int], output_stride: int | None = None) -> Backbone:
        """The backbone of a recipe's section; ``backbone_weights`` that are a file are not loaded here."""
        return cls(
            config.backbone,
            strides,
            pretrained=config.backbone_weights == "imagenet",
            norm=config.norm,
            freeze_stages=config.freeze_stages,
            stride_in_1x1=getattr(config, "stride_in_1x1", False),
            output_stride=output_stride,
        )

    def _up_to(self, stage: str) -> list[str]:
        """Names of the modules from the input to the end of a stage, in the order of their registration."""
        modules = [name for name, _ in self.body.named_modules()]
        names = (stage, stage.replace(".", "_"), f"model.{stage}")  # of timm's three wrappers of a model
        inside = [any(f"{name}.".startswith(f"{top}.") for top in names) for name in modules]
        return modules[: len(inside) - inside[::-1].index(True)]

    def forward(self, images_N3HW: Tensor) -> Pyramid:
        try:
            maps = self.body(images_N3HW)
        except AssertionError as error:  # of a transformer whose windows or positions are those of one size
            height, width = images_N3HW.shape[-2:]
            raise UserError(
                f"backbone {self.name!r} cannot take an input of {height}×{width} ({error}): give a size that "
                "it takes with `keep_ratio: false`, or choose another backbone"
            ) from error
        if self._channels_last:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return dict(zip(self.channels, maps, strict=True))

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        # By name, not by reference: SyncBatchNorm conversion and copies put other modules in their place.
        for name in self._frozen:
            self.body.get_submodule(name).training = False
        return self


@contextmanager
def _quick_refusal() -> Iterator[None]:
    """Where the hub of the weights cannot be reached, use the local cache alone.

    huggingface_hub would try again and again, for more than a minute, before it says so.
    """
    constants: Any = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _hub_is_reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_is_reachable(endpoint: str) -> bool:
    if getproxies():
        return True  # a direct connection would say nothing
    address = urlsplit(endpoint)
    reached = threading.Event()

    def connect() -> None:
        with (
            suppress(OSError),
            socket.create_connection((address.hostname, address.port or 443), HUB_TIMEOUT_S),
        ):
            reached.set()

    # In a thread: looking up the name has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return reached.is_set()


def _move_strides(body: nn.Module, name: str) -> None:
    blocks = [module for module in body.modules() if isinstance(module, Bottleneck)]
    if not blocks:
        raise UserError(f"stride_in_1x1 is given, but {name!r} has no ResNet bottlenecks: leave it out")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


@functools.cache
def offered_strides(name: str) -> tuple[int, ...]:
    """Strides of the feature maps that a timm model offers, shallow to deep.

    Raises:
        UserError: unknown name (the nearest known ones are told), or a model without feature maps.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"timm knows no backbone {name!r}; {hint}")
    try:
        with torch.device("meta"):
            body: Any = timm.create_model(name, features_only=True)
            return tuple(body.feature_info.reduction())
    except Exception as error:
        raise UserError(
            f"backbone {name!r} gives no feature maps ({_short(error)}); choose another timm model"
        ) from error


def _dilation(name: str, output_stride: int) -> dict[str, Any]:
    """timm's argument for it, where the model takes it."""
    try:
        with torch.device("meta"):
            timm.create_model(name, features_only=True, output_stride=output_stride)
    except Exception as error:
        raise UserError(
            f"backbone {name!r} cannot be dilated to an output stride of {output_stride}; "
            f"take a ResNet, RegNet, EfficientNet, MobileNet or ConvNeXt"
        ) from error
    return {"output_stride": output_stride}


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


class FeaturePyramid(nn.Module):
    """Feature pyramid network (Lin et al. 2017), with levels beyond the backbone's last stride.

    Args:
        in_channels: ``{stride: channels}`` of the backbone's maps.
        channels: width of every level.
        strides: levels to return, doubling from one to the next; those that the backbone lacks are made from
            the level before.
        extra: how: ``conv`` is a 3×3 convolution of stride 2, with a ReLU between two of them; ``linear`` the
            same without the ReLU; ``pool`` takes every second cell (Faster R-CNN's P6).
        extra_from: what the first of them is made from: ``forward_features``, its last map (P5), or
            ``backbone``, the backbone's last map (C5, the paper's way for RetinaNet).
        group_norm: whether a GroupNorm follows each convolution, which then has no bias (RepPoints).
    """

    def __init__(
        self,
        in_channels: Mapping[int, int],
        channels: int,
        strides: Sequence[int],
        extra: Literal["conv", "linear", "pool"] = "conv",
        *,
        extra_from: Literal["pyramid", "backbone"] = "pyramid",
        group_norm: bool = False,
    ) -> None:
        super().__init__()
        self.channels = dict.fromkeys(strides, channels)
        norm = group_norm_of if group_norm else None
        self.fpn = FeaturePyramidNetwork(list(in_channels.values()), channels, norm_layer=norm)
        self.extra_strides = tuple(stride for stride in strides if stride not in in_channels)
        self.extra = nn.ModuleList()
        self.extra_relu = extra == "conv"
        self.extra_from = extra_from
        width = channels if extra_from == "pyramid" else in_channels[max(in_channels)]
        for _ in self.extra_strides if extra != "pool" else ():
            conv = nn.Conv2d(width, channels, 3, stride=2, padding=1, bias=not group_norm)
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            self.extra.append(nn.Sequential(conv, group_norm_of(channels)) if group_norm else conv)
            width = channels

    def forward(self, maps: Pyramid) -> Pyramid:
        pyramid: Pyramid = dict(self.fpn(OrderedDict(maps)))
        last = (pyramid if self.extra_from == "pyramid" else maps)[max(maps)]
        for i, stride in enumerate(self.extra_strides):
            if self.extra:
                last = self.extra[i](F.relu(last) if i > 0 and self.extra_relu else last)
            else:
                last = F.max_pool2d(last, kernel_size=1, stride=2)
            pyramid[stride] = last
        return pyramid


def group_norm_of(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, fewer where a group would have less than 8 channels.

    A group of one channel would have nothing to compare on a map of one cell.
    """
    groups = max(n for n in range(1, max(1, min(32, channels // 8)) + 1) if channels % n == 0)
    return nn.GroupNorm(groups, channels)


def split_strides(name: str, strides: Sequence[int]) -> tuple[int, ...]:
    """Those of the wanted strides that the backbone itself gives; the pyramid makes the deeper ones.

    Raises:
        UserError: when the finest wanted stride is not the backbone's.
    """
    offered = offered_strides(name)
    own = tuple(stride for stride in strides if stride <= max(offered))
    if not own:
        raise UserError(f"backbone {name!r} ends at stride {max(offered)}; `strides` begin at {strides[0]}")
    return own
