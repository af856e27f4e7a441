"""Backbones and the feature pyramid: images to ``{stride: map}``."""

from __future__ import annotations

import difflib
import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from detdistill.config import UserError
from detdistill.models.base import Pyramid


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

    Attributes:
        channels: ``{stride: channels}`` of what ``forward`` returns.
        mean, std: the input normalisation that the model's published weights were trained with.

    Raises:
        UserError: unknown name, no feature maps, a stride that is not offered, weights that cannot be had.
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
    ) -> None:
        super().__init__()
        offered = offered_strides(name)
        absent = [stride for stride in strides if stride not in offered]
        if absent:
            raise UserError(
                f"backbone {name!r} offers strides {list(offered)}, not {absent}: "
                f"change `strides` or the backbone"
            )
        # The deepest map of a stride: a plain transformer offers the same one after every block.
        indices = [len(offered) - 1 - offered[::-1].index(stride) for stride in strides]
        try:
            body: Any = timm.create_model(name, features_only=True, out_indices=indices, pretrained=pretrained)
        except Exception as error:
            if not pretrained:
                raise
            raise UserError(
                f"backbone_weights: the ImageNet weights of {name!r} cannot be downloaded ({_short(error)}); "
                f"give a local file in timm's layout, or leave backbone_weights out"
            ) from error
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

    def _up_to(self, stage: str) -> list[str]:
        """Names of the modules from the input to the end of a stage, in the order of their registration."""
        modules = [name for name, _ in self.body.named_modules()]
        names = (stage, stage.replace(".", "_"))  # timm's FeatureListNet flattens names
        inside = [any(f"{name}.".startswith(f"{top}.") for top in names) for name in modules]
        return modules[: len(inside) - inside[::-1].index(True)]

    def forward(self, images_N3HW: Tensor) -> Pyramid:
        maps = self.body(images_N3HW)
        if self._channels_last:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return dict(zip(self.channels, maps, strict=True))

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        # By name, not by reference: SyncBatchNorm conversion and copies put other modules in their place.
        for name in self._frozen:
            self.body.get_submodule(name).training = False
        return self


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


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


class FeaturePyramid(nn.Module):
    """Feature pyramid network (Lin et al. 2017), with levels beyond the backbone's last stride.

    Args:
        in_channels: ``{stride: channels}`` of the backbone's maps.
        channels: width of every level.
        strides: levels to return, doubling from one to the next; those that the backbone lacks are made from
            the level before.
        extra: how: ``conv`` is a 3×3 convolution of stride 2, with a ReLU between two of them (RetinaNet's P6
            and P7, here from P5 as in torchvision); ``pool`` takes every second cell (Faster R-CNN's P6).
    """

    def __init__(
        self, in_channels: Mapping[int, int], channels: int, strides: Sequence[int], extra: str = "conv"
    ) -> None:
        super().__init__()
        self.channels = dict.fromkeys(strides, channels)
        self.fpn = FeaturePyramidNetwork(list(in_channels.values()), channels)
        self.extra_strides = tuple(stride for stride in strides if stride not in in_channels)
        self.extra = nn.ModuleList()
        for _ in self.extra_strides if extra == "conv" else ():
            self.extra.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
        for name, parameter in self.extra.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_uniform_(parameter, a=1)

    def forward(self, maps: Pyramid) -> Pyramid:
        pyramid: Pyramid = dict(self.fpn(OrderedDict(maps)))
        last = pyramid[max(pyramid)]
        for i, stride in enumerate(self.extra_strides):
            if self.extra:
                last = self.extra[i](last if i == 0 else F.relu(last))
            else:
                last = F.max_pool2d(last, kernel_size=1, stride=2)
            pyramid[stride] = last
        return pyramid


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
