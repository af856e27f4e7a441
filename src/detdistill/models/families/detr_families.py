"""Builders of RT-DETRv2 and D-FINE: published sizes over any timm backbone, or a transformers configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from detdistill.errors import UserError
from detdistill.models.base import Preprocess
from detdistill.models.families.detr import (
    DETR,
    NO_MEAN,
    NO_STD,
    STRIDES,
    HybridEncoder,
    TransformersBackbone,
    transformers_module,
)
from detdistill.models.layers.backbones import Backbone
from detdistill.recipe.models import DETRConfig, DFINEConfig, RTDETRv2Config

SIZE = (640, 640)
HEADS = 8  # of attention
MOST_LAYERS, MOST_NUMBER = 256, 2**20  # of a transformers configuration


@dataclass(frozen=True, slots=True)
class Scale:
    """What the papers scale with the backbone.

    Attributes:
        depth: decoder layers.
        neck_width: tower_features width of the neck's convolution blocks over its channels.
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


def build_rtdetr_v2(config: RTDETRv2Config, classes: Sequence[str]) -> DETR:
    """An RT-DETRv2 over any timm backbone with maps of strides 8, 16, 32.

    Published: resnet18d (S), 34d (M*), 50d (L), 101d (X, with 384 channels).
    """
    scale = RTDETR_SCALES.get(config.backbone, Scale())
    return _build(config, classes, "RTDetrV2", "loss_rt_detr.RTDetrForObjectDetectionLoss", scale, {})


def build_d_fine(config: DFINEConfig, classes: Sequence[str]) -> DETR:
    """A D-FINE over any timm backbone. Published: hgnetv2_b0 (S), b2 (M), b4 (L), b5 (X, with 384 channels)."""
    scale = D_FINE_SCALES.get(config.backbone, Scale())
    depth = scale.neck_depth if config.neck_depth is None else config.neck_depth
    options = {"depth_mult": depth, "decoder_n_points": [3, 6, 3]}
    return _build(config, classes, "DFine", "loss_d_fine.DFineForObjectDetectionLoss", scale, options)


def _sizes(channels: int, depth: int) -> dict[str, Any]:
    """transformers' names for the sizes that both families share."""
    if channels % 32:
        raise UserError(
            f"channels is {channels}; give a multiple of 32 ({HEADS} attention heads of 4 at least)"
        )
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
    config: DETRConfig,
    classes: Sequence[str],
    prefix: str,
    criterion: str,
    scale: Scale,
    options: dict[str, Any],
) -> DETR:
    """The family of transformers whose classes begin with ``prefix``, over a timm backbone or its own."""
    transformers = transformers_module()
    body: Any = None
    if config.transformers is None:
        body = Backbone.of(config, STRIDES)
        # transformers builds a backbone of its own, here a small one: the neck reads its channels.
        widths = list(body.channels.values())
        stand_in = transformers.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, *widths], depths=[1, 1, 1, 1], out_indices=[2, 3, 4]
        )
        options |= {
            **_sizes(config.channels, config.head_depth or scale.depth),
            "hidden_expansion": scale.neck_width if config.neck_width is None else config.neck_width,
            "num_queries": config.num_queries,
            "num_denoising": config.num_denoising,
            "backbone_config": stand_in,
            "encoder_in_channels": widths,
        }
    elif config.freeze_stages:
        raise UserError(
            "freeze_stages needs a timm backbone; a transformers checkpoint has its own: leave it out"
        )
    else:
        options = _checked(config.transformers)
    options |= {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: label for label, name in enumerate(classes)},
        "freeze_backbone_batch_norms": config.norm == "frozen",
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
    _initialize(network)
    neck = HybridEncoder(model.encoder_input_proj, model.encoder)
    del model.encoder_input_proj, model.encoder
    module, _, function = criterion.partition(".")
    # The published models take images in [0, 1]; the weights of a backbone know better.
    mean, std = (NO_MEAN, NO_STD) if config.backbone_weights is None else (body.mean, body.std)
    detector = DETR(
        body,
        neck,
        model,
        getattr(transformers_module(f"loss.{module}"), function),
        classes,
        Preprocess(size=SIZE, mean=mean, std=std, keep_ratio=False),
        score_threshold=config.score_threshold,
        max_detections=config.max_detections,
    )
    detector.family = config.family
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


def _initialize(network: Any) -> None:
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
