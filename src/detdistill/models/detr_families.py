"""Builders of RT-DETRv2 and D-FINE: published sizes over any timm backbone, or a transformers configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from detdistill.config import UserError
from detdistill.models.backbones import Backbone
from detdistill.models.base import Preprocess, class_names
from detdistill.models.detr import (
    DETR,
    NO_MEAN,
    NO_STD,
    STRIDES,
    HybridEncoder,
    TransformersBackbone,
    transformers_module,
)

SIZE = (640, 640)
HEADS = 8  # of attention
MOST_LAYERS, MOST_NUMBER = 256, 2**20  # of a transformers configuration


@dataclass(frozen=True, slots=True)
class Scale:
    """What the papers scale with the backbone.

    Attributes:
        depth: decoder layers.
        neck_width: hidden width of the neck's convolution blocks over its channels.
        neck_depth: factor on the convolutions of such a block (D-FINE).
    """

    depth: int = 6
    neck_width: float = 1.0
    neck_depth: float = 1.0


RTDETR_SCALES = {"resnet18d": Scale(3, 0.5), "resnet34d": Scale(4, 0.5)}  # S, M*; R50 and R101 are L and X
D_FINE_SCALES = {
    "hgnetv2_b0": Scale(3, 0.5, 0.34),
    "hgnetv2_b2": Scale(4, 1.0, 0.67),
}  # S, M; B4 and B5 are L, X


def rtdetr_v2(
    backbone: str = "resnet50d",
    num_classes: int = 80,
    *,
    classes: Sequence[str] | None = None,
    channels: int = 256,
    head_depth: int | None = None,
    neck_width: float | None = None,
    num_queries: int = 300,
    num_denoising: int = 100,
    norm: str = "batch",
    freeze_stages: int = 0,
    pretrained_backbone: bool = False,
    preprocess: Preprocess | None = None,
    score_threshold: float = 0.0,
    max_detections: int = 300,
    config: Mapping[str, Any] | None = None,
) -> DETR:
    """An RT-DETRv2 over any timm backbone; the defaults are the published RT-DETRv2-L.

    Args:
        backbone: timm model with maps of strides 8, 16, 32. Published: resnet18d (S), 34d (M*), 50d (L), 101d
            (X, with 384 channels).
        num_classes: number of classes; there is no background class.
        classes: their names (``num_classes`` is then their number); "0", "1", … when not given.
        channels: width of the pyramid, a multiple of 32; the decoder's is at most 256.
        head_depth: decoder layers; when not given 3 for resnet18d, 4 for resnet34d, else 6.
        neck_width: width of the neck's convolution blocks over ``channels``; when not given 0.5 for resnet18d
            and resnet34d, else 1.
        num_queries: objects that an image can have at most.
        num_denoising: noised objects that train the decoder beside the queries; 0: none.
        norm, freeze_stages, pretrained_backbone: as in :class:`~detdistill.models.backbones.Backbone`.
        preprocess: input convention; when not given stretched to 640×640, in [0, 1] (with
            ``pretrained_backbone`` normalised as its weights want).
        score_threshold, max_detections: of detections.
        config: a transformers configuration as a dictionary. It then decides on everything but classes,
            ``norm`` and detections, and the backbone is transformers' own.

    Raises:
        UserError: transformers is not installed; sizes that do not fit; otherwise as
            :class:`~detdistill.models.backbones.Backbone` does.
    """
    scale = RTDETR_SCALES.get(backbone, Scale())
    return _build(
        "rtdetr_v2",
        "RTDetrV2",
        "loss_rt_detr.RTDetrForObjectDetectionLoss",
        backbone,
        class_names(classes, num_classes),
        config,
        {
            **_sizes(channels, scale.depth if head_depth is None else head_depth),
            "hidden_expansion": scale.neck_width if neck_width is None else neck_width,
            "num_queries": num_queries,
            "num_denoising": num_denoising,
        },
        norm=norm,
        freeze_stages=freeze_stages,
        pretrained_backbone=pretrained_backbone,
        preprocess=preprocess,
        score_threshold=score_threshold,
        max_detections=max_detections,
    )


def d_fine(
    backbone: str = "hgnetv2_b4",
    num_classes: int = 80,
    *,
    classes: Sequence[str] | None = None,
    channels: int = 256,
    head_depth: int | None = None,
    neck_width: float | None = None,
    neck_depth: float | None = None,
    num_queries: int = 300,
    num_denoising: int = 100,
    norm: str = "batch",
    freeze_stages: int = 0,
    pretrained_backbone: bool = False,
    preprocess: Preprocess | None = None,
    score_threshold: float = 0.0,
    max_detections: int = 300,
    config: Mapping[str, Any] | None = None,
) -> DETR:
    """A D-FINE over any timm backbone; the defaults are the published D-FINE-L.

    Args:
        backbone: as in :func:`rtdetr_v2`. Published: hgnetv2_b0 (S), b2 (M), b4 (L), b5 (X, with 384 channels).
        head_depth: decoder layers; when not given 3 for hgnetv2_b0, 4 for hgnetv2_b2, else 6.
        neck_width: width of the neck's convolution blocks over ``channels``; when not given 0.5 for hgnetv2_b0,
            else 1.
        neck_depth: factor on the number of their convolutions; when not given 0.34 for hgnetv2_b0, 0.67 for
            hgnetv2_b2, else 1.
        num_classes, classes, channels, num_queries, num_denoising, norm, freeze_stages, pretrained_backbone,
            preprocess, score_threshold, max_detections, config: as in :func:`rtdetr_v2`.

    Raises:
        UserError: as :func:`rtdetr_v2` does.
    """
    scale = D_FINE_SCALES.get(backbone, Scale())
    return _build(
        "d_fine",
        "DFine",
        "loss_d_fine.DFineForObjectDetectionLoss",
        backbone,
        class_names(classes, num_classes),
        config,
        {
            **_sizes(channels, scale.depth if head_depth is None else head_depth),
            "hidden_expansion": scale.neck_width if neck_width is None else neck_width,
            "depth_mult": scale.neck_depth if neck_depth is None else neck_depth,
            "decoder_n_points": [3, 6, 3],
            "num_queries": num_queries,
            "num_denoising": num_denoising,
        },
        norm=norm,
        freeze_stages=freeze_stages,
        pretrained_backbone=pretrained_backbone,
        preprocess=preprocess,
        score_threshold=score_threshold,
        max_detections=max_detections,
    )


def _sizes(channels: int, depth: int) -> dict[str, Any]:
    """transformers' names for the sizes that both families share."""
    if channels % 32:
        raise UserError(
            f"channels is {channels}; give a multiple of 32 ({HEADS} attention heads of 4 at least)"
        )
    if depth < 1:
        raise UserError("head_depth is 0, but the decoder needs a layer: give 1 or more")
    width = min(channels, 256)
    return {
        "encoder_hidden_dim": channels,
        "encoder_ffn_dim": 1
        << (4 * channels - 1).bit_length(),  # 1024 of 256 channels, 2048 of 384: as published
        "decoder_in_channels": [channels] * len(STRIDES),
        "d_model": width,
        "decoder_ffn_dim": 4 * width,
        "decoder_layers": depth,
    }


def _build(
    family: str,
    prefix: str,
    criterion: str,
    backbone: str,
    classes: tuple[str, ...],
    config: Mapping[str, Any] | None,
    options: dict[str, Any],
    *,
    norm: str,
    freeze_stages: int,
    pretrained_backbone: bool,
    preprocess: Preprocess | None,
    score_threshold: float,
    max_detections: int,
) -> DETR:
    transformers = transformers_module()
    body: Any = None
    if config is None:
        body = Backbone(
            backbone, STRIDES, pretrained=pretrained_backbone, norm=norm, freeze_stages=freeze_stages
        )  # fmt: skip
        # transformers builds a backbone of its own, here a small one: the neck reads its channels.
        widths = list(body.channels.values())
        stand_in = transformers.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, *widths], depths=[1, 1, 1, 1], out_indices=[2, 3, 4]
        )
        options |= {"backbone_config": stand_in, "encoder_in_channels": widths}
    elif freeze_stages:
        raise UserError(
            "freeze_stages needs a timm backbone; a transformers checkpoint has its own: leave it out"
        )
    else:
        options = _checked(config)
    options |= {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: label for label, name in enumerate(classes)},
        "freeze_backbone_batch_norms": norm == "frozen",
        # Any input size; and each layer's predictions its own, as in the papers (transformers would tie them).
        "anchor_image_size": None,
        "eval_size": None,
        "tie_word_embeddings": False,
    }
    settings = getattr(transformers, f"{prefix}Config").from_dict(options)
    network = getattr(transformers, f"{prefix}ForObjectDetection")(settings)
    model = network.model
    if body is None:
        body = TransformersBackbone(model.backbone.model, settings.feat_strides)
    del model.backbone
    _initialise(network)
    neck = HybridEncoder(model.encoder_input_proj, model.encoder)
    del model.encoder_input_proj, model.encoder
    module, _, function = criterion.partition(".")
    mean, std = (body.mean, body.std) if pretrained_backbone else (NO_MEAN, NO_STD)
    detector = DETR(
        body,
        neck,
        model,
        getattr(transformers_module(f"loss.{module}"), function),
        classes,
        preprocess or Preprocess(size=SIZE, mean=mean, std=std, keep_ratio=False),
        score_threshold=score_threshold,
        max_detections=max_detections,
    )
    detector.family = family
    return detector


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformers configuration without what would download a backbone's weights.

    Raises:
        UserError: it has numbers that no such model has.
    """
    _require_numbers(config, "")
    backbone = config.get("backbone_config")
    if not isinstance(backbone, Mapping):
        raise UserError(
            "the transformers configuration has no backbone_config: save it with transformers again"
        )
    options = {
        key: value for key, value in config.items() if key not in ("backbone", "use_pretrained_backbone")
    }
    return options | {"backbone_config": {**backbone, "use_pretrained_backbone": False}}


def _require_numbers(value: Any, at: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _require_numbers(inner, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_numbers(inner, at)
    elif isinstance(value, int | float):
        key = at.rpartition(".")[2]
        most = MOST_LAYERS if key.endswith(("layers", "depths", "blocks")) else MOST_NUMBER
        if not -most <= value <= most:  # neither is NaN
            raise UserError(f"the transformers configuration says {at}: {value}; at most {most:,} can be built")


def _initialise(network: Any) -> None:
    """Start neck and head from where the papers' code starts.

    transformers draws convolutions, linear layers and RT-DETRv2's BatchNorm gains from N(0, 0.01): right for
    weights that are loaded, but a model trained from there hardly learns.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()
    for module in network.modules():
        if any(module.children()):
            network._init_weights(
                module
            )  # what is special: score biases, sampling offsets, gates, last box layers
    decoder = network.model.decoder
    for mlp in (network.model.enc_bbox_head, getattr(decoder, "pre_bbox_head", None)):
        if mlp is not None:
            nn.init.zeros_(mlp.layers[-1].weight)
            nn.init.zeros_(mlp.layers[-1].bias)
