"""RT-DETRv2 and D-FINE, by an adapter over Hugging Face transformers (extra ``detdistill[transformers]``).

RT-DETRv2: Lv et al., "RT-DETRv2: Improved Baseline with Bag-of-Freebies", 2024. D-FINE: Peng et al., "D-FINE:
Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", ICLR 2025. Hybrid encoder, decoder,
matching and losses are transformers' own; a test holds the five steps against its models. They answer from
queries matched one to one, so there is no suppression. The matching runs on the CPU: a training step waits for
the device once a decoder layer.

Shape legend: N images, S queries, Q classes, K objects, L decoder layers.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from detdistill.config import UserError
from detdistill.models.backbones import Backbone
from detdistill.models.base import Batch, Detections, Detector, Preprocess, Pyramid, QueryRaw, Raw
from detdistill.models.heads import normaliser

STRIDES = (8, 16, 32)
SIZE = (640, 640)
HEADS = 8  # of attention
NO_MEAN, NO_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the published weights want RGB in [0, 1] as it is

LOSSES = {
    "vfl": "classification",
    "bbox": "bbox_l1",
    "giou": "bbox_giou",
    "fgl": "bbox_distribution",
    "ddf": "self_distillation",
}
"""Our names of transformers' terms ``loss_KIND``, each summed over the layers."""


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


class TransformersBackbone(nn.Module):
    """The backbone of a transformers model: for weights in its layout."""

    mean, std = NO_MEAN, NO_STD

    def __init__(self, body: nn.Module, strides: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        self.strides = tuple(strides)

    def forward(self, images_N3HW: Tensor) -> Pyramid:
        return dict(zip(self.strides, self.body(images_N3HW).feature_maps, strict=True))


class HybridEncoder(nn.Module):
    """The neck: attention on the coarsest map, then convolutions from coarse to fine and back."""

    def __init__(self, projections: nn.ModuleList, encoder: nn.Module) -> None:
        super().__init__()
        self.projections = projections
        self.encoder = encoder

    def forward(self, maps: Pyramid) -> Pyramid:
        projected = [layer(x) for layer, x in zip(self.projections, maps.values(), strict=True)]
        return dict(zip(maps, self.encoder(projected).last_hidden_state, strict=True))


class DETR(Detector):
    """The five steps of RT-DETRv2 and D-FINE; build it with :func:`rtdetr_v2` or :func:`d_fine`.

    Losses are transformers' own, each with its published weight, summed over the decoder's layers and its
    initial queries and divided by the batch's number of objects (at least 1; averaged over the processes as in
    FCOS): ``classification`` (varifocal), ``bbox_l1``, ``bbox_giou``; for D-FINE ``bbox_distribution`` (FGL)
    and ``self_distillation`` (DDF, a mean over queries); and ``denoising``, all of these for noised objects,
    drawn in ``predict`` from torch's global random state.

    Args:
        backbone: images to maps of STRIDES.
        neck: those maps to the pyramid.
        head: transformers' model without its backbone and encoder: choice of queries, decoder, predictions.
        criterion: transformers' loss function for it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: HybridEncoder,
        head: Any,
        criterion: Any,
        classes: Sequence[str],
        preprocess: Preprocess,
        *,
        score_threshold: float,
        max_detections: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.criterion = criterion
        self.classes = tuple(classes)
        self.preprocessor = preprocess
        self.pyramid_channels = dict.fromkeys(head.config.feat_strides, head.config.encoder_hidden_dim)
        self.num_queries: int = head.config.num_queries
        self.score_threshold = score_threshold
        self.max_detections = max_detections

    def pyramid(self, batch: Batch) -> Pyramid:
        return self.neck(self.backbone(batch.images_N3HW))

    def predict(self, pyramid: Pyramid, batch: Batch) -> QueryRaw:
        maps = list(pyramid.values())
        queries = min(self.num_queries, sum(x.shape[-2] * x.shape[-1] for x in maps))
        self.head.config.num_queries = queries  # each begins as a cell of its own: a small input has fewer
        outputs = self.head(
            None,
            encoder_outputs=_encoded(maps),
            inputs_embeds=maps[0],  # with encoder_outputs only its batch size and device are read
            labels=normalised_targets(batch) if self.training and batch.targets is not None else None,
        )
        return QueryRaw(
            logits_NSQ=outputs.intermediate_logits[:, -1, -queries:],
            boxes_NS4=outputs.intermediate_reference_points[:, -1, -queries:],
            outputs=outputs,
        )

    def losses(self, raw: Raw, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(raw, QueryRaw)
        assert batch.targets is not None, "losses need a batch with targets"
        outputs = raw.outputs
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            logits_NLSQ = outputs.intermediate_logits.float()
            boxes_NLS4 = outputs.intermediate_reference_points.float()
            _, terms, _ = self.criterion(
                logits_NLSQ[:, -1],
                normalised_targets(batch),
                logits_NLSQ.device,
                boxes_NLS4[:, -1],
                self.head.config,
                logits_NLSQ,
                boxes_NLS4,
                enc_topk_logits=outputs.enc_topk_logits.float(),
                enc_topk_bboxes=outputs.enc_topk_bboxes.float(),
                denoising_meta_values=outputs.denoising_meta_values,
                predicted_corners=_float(outputs.intermediate_predicted_corners),
                initial_reference_points=_float(outputs.initial_reference_points),
            )
            # transformers divides by this process's number of objects.
            objects = float(sum(len(target["boxes"]) for target in batch.targets))
            share = max(objects, 1.0) / normaliser(logits_NLSQ.new_tensor(objects))
            losses: dict[str, Tensor] = {}
            for term, value in terms.items():
                kind, *layer = term.removeprefix("loss_").split("_")
                name = "denoising" if "dn" in layer else LOSSES[kind]
                losses[name] = losses.get(name, 0) + (value if kind == "ddf" else value * share)
            if self.training and self.head.config.num_denoising and "denoising" not in losses:
                # No image has objects. Every parameter takes part, or DistributedDataParallel would wait.
                losses["denoising"] = self.head.denoising_class_embed.weight.sum() * 0
        return losses

    def decode(self, raw: Raw, batch: Batch) -> list[Detections]:
        assert isinstance(raw, QueryRaw)
        height, width = batch.padded_size
        boxes_NS4 = box_convert(raw.boxes_NS4.float(), "cxcywh", "xyxy")
        boxes_NS4 = boxes_NS4 * boxes_NS4.new_tensor([width, height, width, height])
        count = min(raw.logits_NSQ.shape[1], self.max_detections)
        scores_NM, best_NM = raw.logits_NSQ.float().sigmoid().flatten(1).topk(count)
        detections = []
        for i, (size, original) in enumerate(zip(batch.sizes, batch.original_sizes, strict=True)):
            kept = scores_NM[i] > self.score_threshold
            best = best_NM[i][kept]
            boxes = clip_boxes_to_image(boxes_NS4[i][best // len(self.classes)], size)
            ratio_y, ratio_x = original[0] / size[0], original[1] / size[1]
            detections.append({
                "boxes": boxes * boxes.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y]),
                "labels": best % len(self.classes),
                "scores": scores_NM[i][kept],
            })  # fmt: skip
        return detections


def normalised_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """The targets as transformers wants them: boxes as centre and size over those of the padded input."""
    assert batch.targets is not None
    height, width = batch.padded_size
    targets = []
    for target in batch.targets:
        boxes_K4 = box_convert(target["boxes"].float(), "xyxy", "cxcywh")
        sides_4 = boxes_K4.new_tensor([width, height, width, height])
        targets.append({"class_labels": target["labels"], "boxes": boxes_K4 / sides_4})
    return targets


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _encoded(maps: list[Tensor]) -> Any:
    return _transformers("modeling_outputs").BaseModelOutput(last_hidden_state=maps)


def _transformers(module: str = "") -> Any:
    """transformers, or a module of it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(f"transformers.{module}" if module else "transformers")
    except ModuleNotFoundError as error:
        raise UserError(
            "RT-DETRv2 and D-FINE need transformers: pip install 'detdistill[transformers]'"
        ) from error


# --- building --------------------------------------------------------------------------------------------


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
        "RTDetrV2",
        "loss_rt_detr.RTDetrForObjectDetectionLoss",
        backbone,
        tuple(classes) if classes is not None else tuple(map(str, range(num_classes))),
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
        "DFine",
        "loss_d_fine.DFineForObjectDetectionLoss",
        backbone,
        tuple(classes) if classes is not None else tuple(map(str, range(num_classes))),
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
    transformers = _transformers()
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
        options = dict(config)
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
    return DETR(
        body,
        neck,
        model,
        getattr(_transformers(f"loss.{module}"), function),
        classes,
        preprocess or Preprocess(size=SIZE, mean=mean, std=std, keep_ratio=False),
        score_threshold=score_threshold,
        max_detections=max_detections,
    )


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
