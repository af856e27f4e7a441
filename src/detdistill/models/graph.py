"""A model as one graph of tensors, for devices: fixed input size, no loops over images, no suppression.

::

    images (N, 3, H, W) ─normalize─▶ backbone, neck, head ─┬─▶ candidates: boxes, scores, labels
                                                           └─▶ label maps

Suppression stays outside: its result has no fixed size. (That in the middle of a two-stage detector is inside:
there it is made to have one.)

Shape legend: N images, M candidates, Q classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.errors import UserError
from detdistill.models.base import Batch, Candidates, Detections, ExportableDetector, Model, Preprocess
from detdistill.models.families.segmentation import EncoderDecoder, resize_logits
from detdistill.models.layers.heads import best_detections
from detdistill.models.layers.masks import paste_masks
from detdistill.recipe import Convention


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

    def canvas(self, images: Sequence[Tensor]) -> tuple[int, int]:
        """The size, whatever the images."""
        assert self.size is not None
        return self.size


def letterbox_of(preprocess: Preprocess, size: tuple[int, int]) -> Letterbox:
    """The same convention, for inputs of one size."""
    return Letterbox(
        size=size, mean=preprocess.mean, std=preprocess.std, divisor=preprocess.divisor,
        keep_ratio=preprocess.keep_ratio, bgr=preprocess.bgr, fill=preprocess.fill,
    )  # fmt: skip


class ModelGraph(nn.Module):
    """What torch.export can trace of a model; :func:`graph_of` builds it.

    Args:
        model: it is used, not copied, and set to evaluation mode.

    Attributes:
        needs_sizes: it takes a second input, each image's own size.
        any_batch: it can be traced for any number of images; else for one.
    """

    needs_sizes: bool = False
    any_batch: bool = True
    mean_311: Tensor
    std_311: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        # 255 · mean, so that the graph takes pixels as they come from a camera.
        for name, values in (("mean_311", model.preprocessor.mean), ("std_311", model.preprocessor.std)):
            self.register_buffer(name, 255 * torch.tensor(values)[:, None, None], persistent=False)
        self.eval()

    def normalized(self, images_N3HW: Tensor) -> Tensor:
        """What the network takes, from RGB, 0…255."""
        x_N3HW = (images_N3HW - self.mean_311) / self.std_311
        return x_N3HW.flip(1) if self.model.preprocessor.bgr else x_N3HW


class DetectionGraph(ModelGraph):
    """Images to candidates."""

    model: ExportableDetector

    def __init__(self, model: ExportableDetector) -> None:
        super().__init__(model)
        self.needs_sizes, self.any_batch = model.needs_sizes, model.any_batch

    def forward(self, images_N3HW: Tensor, sizes_N2: Tensor | None = None) -> tuple[Tensor, ...]:
        """The fields of :class:`Candidates`, without None.

        A plain tuple: a program of torch.export is to be opened where detdistill is not.

        Args:
            images_N3HW: RGB, 0…255, all of one size.
            sizes_N2: where the model ``needs_sizes``, (height, width) of what is image in each, float32.
        """
        sizes: Any = [] if sizes_N2 is None else list(sizes_N2)
        batch = Batch(self.normalized(images_N3HW), sizes, [], None)
        return tuple(part for part in self.model.candidates(batch) if part is not None)


class SegmentationGraph(ModelGraph):
    """Images to label maps. A large image is looked at whole, whatever the model's ``window``."""

    model: EncoderDecoder

    def forward(self, images_N3HW: Tensor) -> tuple[Tensor]:
        """The likeliest class of each pixel of the input, (N, H, W) uint8, from RGB, 0…255."""
        batch = Batch(self.normalized(images_N3HW), [], [], None)
        outputs = self.model.forward_head(self.model.forward_features(batch), batch)
        return (resize_logits(outputs.logits_NQHW, batch.padded_size).argmax(dim=1).to(torch.uint8),)


def graph_of(model: Model) -> DetectionGraph | SegmentationGraph:
    """The graph of a model.

    Raises:
        UserError: it has no outputs of a fixed size.
    """
    family = type(model).__name__ if model.config is None else model.config.family
    if isinstance(model, EncoderDecoder):
        return SegmentationGraph(model)
    if not isinstance(model, ExportableDetector):
        raise UserError(f"a {family} cannot be exported: train a student of a family from here instead")
    return DetectionGraph(model)


def suppress(
    candidates: Candidates,
    batch: Batch,
    *,
    nms_threshold: float | None,
    max_detections: int,
    drop_empty: bool,
    mask_convention: Convention | None = None,
) -> list[Detections]:
    """What stays outside of the graph: detections in pixels of the original images.

    Args:
        candidates: on one device.
        batch: what the graph saw.
        nms_threshold: of suppression by class; None: there is none.
        max_detections: of an image.
        drop_empty: boxes without an area inside the image are left out before suppression.
        mask_convention: whose way masks are laid into the image, where there are any.
    """
    detections = []
    for i, (size, original_size) in enumerate(zip(batch.sizes, batch.original_sizes, strict=True)):
        boxes_M4, scores_M, labels_M = (part[i] for part in candidates[:3])
        edge_4 = boxes_M4.new_tensor([size[1], size[0], size[1], size[0]])
        boxes_M4 = boxes_M4.clamp(min=0).minimum(edge_4)
        kept_M = scores_M > 0
        if drop_empty:
            kept_M &= (boxes_M4[:, 2:] > boxes_M4[:, :2]).all(dim=1)
        found = best_detections(
            boxes_M4[kept_M],
            scores_M[kept_M],
            labels_M[kept_M],
            nms_threshold,
            max_detections,
            size,
            original_size,
        )
        if candidates.masks_NMSS is not None and mask_convention is not None:
            # Nothing is suppressed any more, and the scores were falling already.
            masks_KSS = candidates.masks_NMSS[i][kept_M][:max_detections]
            found["masks"] = paste_masks(masks_KSS, found["boxes"], original_size, mask_convention)
        detections.append(found)
    return detections
