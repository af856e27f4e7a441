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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from detdistill.errors import UserError
from detdistill.models.base import (
    Batch,
    Candidates,
    Detections,
    ExportableDetector,
    HeadOutputs,
    Preprocess,
    Pyramid,
    QueryOutputs,
)
from detdistill.models.layers.heads import avg_factor, best_scores

STRIDES = (8, 16, 32)
NO_MEAN, NO_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # the published weights want RGB in [0, 1] as it is

LOSSES = {
    "vfl": "classification",
    "bbox": "bbox_l1",
    "giou": "bbox_giou",
    "fgl": "bbox_distribution",
    "ddf": "self_distillation",
}
"""Our names of transformers' terms ``loss_KIND``, each summed over the layers."""


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


class DETR(ExportableDetector):
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

    kind = "queries"
    nms_threshold = None
    any_batch = False  # transformers' code knows their number when it is traced

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

    def forward_features(self, batch: Batch) -> Pyramid:
        return self.neck(self.backbone(batch.images_N3HW))

    def forward_head(self, pyramid: Pyramid, batch: Batch) -> QueryOutputs:
        maps = list(pyramid.values())
        queries = min(self.num_queries, sum(x.shape[-2] * x.shape[-1] for x in maps))
        self.head.config.num_queries = queries  # each begins as a cell of its own: a small input has fewer
        outputs = self.head(
            None,
            encoder_outputs=_encoded(maps),
            inputs_embeds=maps[0],  # with encoder_outputs only its batch size and device are read
            labels=normalized_targets(batch) if self.training and batch.targets is not None else None,
        )
        return QueryOutputs(
            logits_NSQ=outputs.intermediate_logits[:, -1, -queries:],
            boxes_NS4=outputs.intermediate_reference_points[:, -1, -queries:],
            outputs=outputs,
        )

    def losses(self, head_outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(head_outputs, QueryOutputs)
        assert batch.targets is not None, "losses need a batch with targets"
        outputs = head_outputs.outputs
        with torch.autocast(batch.images_N3HW.device.type, enabled=False):
            logits_NLSQ = outputs.intermediate_logits.float()
            boxes_NLS4 = outputs.intermediate_reference_points.float()
            _, terms, _ = self.criterion(
                logits_NLSQ[:, -1],
                normalized_targets(batch),
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
            share = max(objects, 1.0) / avg_factor(logits_NLSQ.new_tensor(objects))
            losses: dict[str, Tensor] = {}
            for term, value in terms.items():
                kind, *layer = term.removeprefix("loss_").split("_")
                name = "denoising" if "dn" in layer else LOSSES[kind]
                losses[name] = losses.get(name, 0) + (value if kind == "ddf" else value * share)
            if self.training and self.head.config.num_denoising and "denoising" not in losses:
                # No image has objects. Every parameter takes part, or DistributedDataParallel would wait.
                losses["denoising"] = self.head.denoising_class_embed.weight.sum() * 0
        return losses

    def decode(self, head_outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(head_outputs, QueryOutputs)
        boxes_NM4, scores_NM, labels_NM, _ = self._best(head_outputs, batch)
        detections = []
        for i, (size, original) in enumerate(zip(batch.sizes, batch.original_sizes, strict=True)):
            kept = scores_NM[i] > 0
            boxes = clip_boxes_to_image(boxes_NM4[i][kept], size)
            ratio_y, ratio_x = original[0] / size[0], original[1] / size[1]
            detections.append({
                "boxes": boxes * boxes.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y]),
                "labels": labels_NM[i][kept],
                "scores": scores_NM[i][kept],
            })  # fmt: skip
        return detections

    def candidates(self, batch: Batch) -> Candidates:
        return self._best(self.forward_head(self.forward_features(batch), batch), batch)

    def _best(self, head_outputs: QueryOutputs, batch: Batch) -> Candidates:
        """The best scores of all queries and classes, with their boxes in network input, falling."""
        height, width = batch.padded_size
        boxes_NS4 = box_convert(head_outputs.boxes_NS4.float(), "cxcywh", "xyxy")
        boxes_NS4 = boxes_NS4 * boxes_NS4.new_tensor([width, height, width, height])
        count = min(head_outputs.logits_NSQ.shape[1], self.max_detections)
        scores_NM, at_NM, labels_NM = best_scores(head_outputs.logits_NSQ.float().sigmoid(), count)
        boxes_NM4 = boxes_NS4.gather(1, at_NM[..., None].expand(-1, -1, 4))
        return Candidates(boxes_NM4, torch.where(scores_NM > self.score_threshold, scores_NM, 0.0), labels_NM)


def normalized_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """The targets as transformers wants them: boxes as center and size over those of the padded input."""
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
    return transformers_module("modeling_outputs").BaseModelOutput(last_hidden_state=maps)


def transformers_module(module: str = "") -> Any:
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
