"""What one-stage detectors share: a dense head on every level of the pyramid, and the choice of detections.

Shape legend: N images, P anchors (of a level, or of all levels one after the other), Q classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import clip_boxes_to_image

from detdistill.models.backbones import Backbone, FeaturePyramid
from detdistill.models.base import Batch, DenseRaw, Detections, Detector, Preprocess, Pyramid, Raw
from detdistill.models.heads import (
    DenseHead,
    best_detections,
    flatten_maps,
    level_anchors,
    select_candidates,
)


class OneStage(Detector):
    """Backbone, neck and dense head. A family adds its losses, its scores and its encoding of boxes."""

    def __init__(
        self,
        backbone: Backbone,
        neck: FeaturePyramid,
        head: DenseHead,
        anchor_generator: AnchorGenerator,
        classes: Sequence[str],
        preprocess: Preprocess,
        *,
        score_threshold: float,
        nms_threshold: float,
        max_detections: int,
        topk_candidates: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.anchor_generator = anchor_generator
        self.classes = tuple(classes)
        self.preprocessor = preprocess
        self.pyramid_channels = neck.channels
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.topk_candidates = topk_candidates

    def pyramid(self, batch: Batch) -> Pyramid:
        return self.neck(self.backbone(batch.images_N3HW))

    def predict(self, pyramid: Pyramid, batch: Batch, *, hidden: bool = False) -> DenseRaw:
        """Head outputs; with ``hidden`` also the towers' maps before each ReLU."""
        return self.head(pyramid, hidden)

    def anchors(self, pyramid: Pyramid, batch: Batch) -> list[Tensor]:
        """What the dense outputs answer for, level by level: (H·W·A, 4) xyxy in network input, rows first.

        The same for every image. Anchor-free heads have one square, of the stride's size, about each cell's
        centre.
        """
        return level_anchors(self.anchor_generator, pyramid, batch)

    @abstractmethod
    def match(self, boxes_K4: Tensor, anchors: Sequence[Tensor]) -> Tensor:
        """Which object each anchor answers for in training.

        Args:
            boxes_K4: objects in network input; K may be 0.
            anchors: of each level, as :meth:`anchors` gives them.

        Returns:
            (P,) int64: index of the object, UNMATCHED or IGNORED. No host synchronisation.
        """

    @abstractmethod
    def scores(self, raw: DenseRaw) -> list[Tensor]:
        """Level by level (N, P, Q) in [0, 1]: by what detections are chosen."""

    @abstractmethod
    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (..., 4) xyxy from the head's encoding (..., 4) at anchors that broadcast to it."""

    def boxes(self, raw: DenseRaw, batch: Batch) -> Tensor:
        """Every anchor's box, (N, P, 4) float32 xyxy in network input, all levels."""
        encoded_NP4 = torch.cat(flatten_maps(raw.box.values(), 4), dim=1)
        return self.decode_boxes(encoded_NP4, torch.cat(self.anchors(raw.cls, batch)))

    def decode(self, raw: Raw, batch: Batch) -> list[Detections]:
        assert isinstance(raw, DenseRaw)
        levels = list(
            zip(
                self.scores(raw),
                flatten_maps(raw.box.values(), 4),
                self.anchors(raw.cls, batch),
                strict=True,
            )
        )
        detections = []
        for i, size in enumerate(batch.sizes):
            found = []
            for scores_NPQ, encoded_NP4, anchors_P4 in levels:
                scores, at, labels = select_candidates(
                    scores_NPQ[i], self.score_threshold, self.topk_candidates
                )
                boxes = self.decode_boxes(encoded_NP4[i][at], anchors_P4[at])
                found.append((clip_boxes_to_image(boxes, size), scores, labels))
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
            detections.append(
                best_detections(
                    boxes,
                    scores,
                    labels,
                    self.nms_threshold,
                    self.max_detections,
                    size,
                    batch.original_sizes[i],
                )
            )
        return detections
