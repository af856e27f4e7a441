"""A detector as one graph of tensors, for devices: fixed input size, no loops over images, no suppression.

::

    images (N, 3, H, W) ─normalise─▶ backbone, neck, head ─▶ best of each level ─▶ boxes, scores, labels

Suppression stays outside: its result has no fixed size. Only one-stage detectors are graphs of this kind; a
two-stage detector needs a suppression in its middle.

Shape legend: N images, P anchors of a level, Q classes, M candidates of all levels, E numbers of a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detdistill.config import UserError
from detdistill.models.base import Batch, Detections, Detector, Preprocess
from detdistill.models.heads import best_detections, flatten_maps
from detdistill.models.one_stage import OneStage


@dataclass(frozen=True)
class Letterbox(Preprocess):
    """An input convention whose input has one size, (height, width), whatever the images.

    An image is resized to fit in, its ratio kept, and lies in the upper left corner; the rest is ``fill``. With
    ``keep_ratio=False`` it is stretched, as by :class:`~detdistill.models.base.Preprocess`.
    """

    def scale(self, height: int, width: int) -> float:
        """The largest factor at which an image of this size fits in."""
        assert self.size is not None
        return min(self.size[0] / height, self.size[1] / width)

    def _pad(self, images: Sequence[Tensor]) -> Tensor:
        assert self.size is not None
        padded = images[0].new_full((len(images), 3, *self.size), self.fill)
        for row, image in zip(padded, images, strict=True):
            row[:, : image.shape[-2], : image.shape[-1]].copy_(image)
        return padded


def letterbox_of(preprocess: Preprocess, size: tuple[int, int]) -> Letterbox:
    """The same convention, for inputs of one size."""
    return Letterbox(
        size=size, mean=preprocess.mean, std=preprocess.std, divisor=preprocess.divisor,
        keep_ratio=preprocess.keep_ratio, bgr=preprocess.bgr, fill=preprocess.fill,
    )  # fmt: skip


class Candidates(NamedTuple):
    """What the graph gives; the best of each level one after the other.

    Attributes:
        boxes_NM4: float32 xyxy in pixels of the input, not clipped.
        scores_NM: float32; 0 where a candidate's class score is not above the detector's threshold.
        labels_NM: int64.
    """

    boxes_NM4: Tensor
    scores_NM: Tensor
    labels_NM: Tensor


class DetectionGraph(nn.Module):
    """What torch.export can trace of a one-stage detector.

    Args:
        model: it is used, not copied, and set to evaluation mode.

    Raises:
        UserError: the detector is of another kind.
    """

    mean_311: Tensor
    std_311: Tensor

    def __init__(self, model: Detector) -> None:
        super().__init__()
        if not isinstance(model, OneStage):
            family = (model.spec or {}).get("model", {}).get("family", type(model).__name__)
            raise UserError(
                f"a detector of family {family} cannot be exported: train a one-stage student "
                f"(retinanet, fcos, gfl, reppoints) instead"
            )
        self.model = model
        preprocess = model.preprocessor
        # 255 · mean, so that the graph takes pixels as they come from a camera.
        for name, values in (("mean_311", preprocess.mean), ("std_311", preprocess.std)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)
        self.eval()

    def forward(self, images_N3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of :class:`Candidates` from RGB images, 0…255, all of one size.

        A plain tuple: a program of torch.export is to be opened where detdistill is not.
        """
        model = self.model
        x_N3HW = (images_N3HW - self.mean_311) / self.std_311
        x_N3HW = x_N3HW.flip(1) if model.preprocessor.bgr else x_N3HW
        batch = Batch(x_N3HW, [], [], None)  # nothing below asks for sizes
        raw = model.predict(model.pyramid(batch), batch)
        encoded = flatten_maps(raw.box.values(), model.head.box_width)
        factors = model.score_factors(raw)
        found = []
        for level, (scores_NPQ, encoded_NPE, anchors_P4) in enumerate(
            zip(model.scores(raw), encoded, model.anchors(raw.cls, batch), strict=True)
        ):
            scores, at, labels = best_of_level(scores_NPQ, model.topk_candidates)
            kept = scores > model.score_threshold
            if factors is not None:
                scores = scores * factors[level].gather(1, at)
            boxes = model.decode_boxes(
                encoded_NPE.gather(1, at[..., None].expand(-1, -1, encoded_NPE.shape[2])), anchors_P4[at]
            )
            found.append((boxes, torch.where(kept, scores, 0.0), labels))
        boxes_NM4, scores_NM, labels_NM = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return boxes_NM4, scores_NM, labels_NM


def best_of_level(scores_NPQ: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``limit`` scores of each image on one level: scores falling, anchors, labels; each (N, M)."""
    _, anchors, classes = scores_NPQ.shape
    scores, index = scores_NPQ.flatten(1).topk(min(limit, anchors * classes))
    return scores, torch.div(index, classes, rounding_mode="floor"), index % classes


def suppress(
    candidates: Candidates,
    batch: Batch,
    *,
    nms_threshold: float,
    max_detections: int,
    drop_empty: bool,
) -> list[Detections]:
    """What stays outside of the graph: detections in pixels of the original images.

    Args:
        candidates: on one device.
        batch: what the graph saw.
        nms_threshold, max_detections: of detections.
        drop_empty: boxes without an area inside the image are left out before suppression.
    """
    detections = []
    for i, (size, original_size) in enumerate(zip(batch.sizes, batch.original_sizes, strict=True)):
        boxes_M4, scores_M, labels_M = (part[i] for part in candidates)
        edge_4 = boxes_M4.new_tensor([size[1], size[0], size[1], size[0]])
        boxes_M4 = boxes_M4.clamp(min=0).minimum(edge_4)
        kept_M = scores_M > 0
        if drop_empty:
            kept_M &= (boxes_M4[:, 2:] > boxes_M4[:, :2]).all(dim=1)
        detections.append(
            best_detections(
                boxes_M4[kept_M],
                scores_M[kept_M],
                labels_M[kept_M],
                nms_threshold,
                max_detections,
                size,
                original_size,
            )
        )
    return detections
