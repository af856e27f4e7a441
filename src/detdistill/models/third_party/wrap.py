"""Detectors and segmenters that this project did not write: any module with feature maps, in five steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image

from detdistill.errors import UserError
from detdistill.models.base import (
    Batch,
    Detections,
    Detector,
    HeadOutputs,
    Kind,
    Model,
    Preprocess,
    Pyramid,
    SegmentationOutputs,
    Segmenter,
    TappedPyramid,
    ThirdPartyOutputs,
)
from detdistill.models.families.segmentation import label_maps, pixel_losses
from detdistill.models.third_party.taps import Call, Taps, seen
from detdistill.models.third_party.torchvision import wrap_torchvision
from detdistill.models.third_party.torchvision_ssd import TorchvisionSSD
from detdistill.recipe import names_of

Losses = Callable[[nn.Module, Any, Batch], Mapping[str, Tensor]]
Decode = Callable[[nn.Module, Any, Batch], Sequence[Detections]]
Logits = Callable[[nn.Module, Any, Batch], Tensor]

WITHOUT_TAPS = (detection.RetinaNet, detection.FCOS, detection.FasterRCNN)  # a MaskRCNN is a FasterRCNN


def wrap(
    model: nn.Module,
    taps: Mapping[int, str] | None = None,
    preprocess: Preprocess | None = None,
    classes: Sequence[str] = (),
    *,
    call: Call | None = None,
    losses: Losses | None = None,
    decode: Decode | None = None,
    kind: Kind | None = None,
    logits: Logits | None = None,
) -> Detector | Segmenter:
    """Make a detector of any module, to be a teacher or, with ``losses``, a student.

    With ``logits`` it is a segmenter, which can learn without ``losses``.

    torchvision's own RetinaNet, FCOS, SSD, Faster R-CNN and Mask R-CNN objects need neither taps nor functions.

    Args:
        model: any module; it is not copied, and nothing is added to it.
        taps: ``{stride: name}`` of the submodules whose outputs are the pyramid, as ``{8: "neck.p3"}``. Of an
            output that is a tuple, list or dict, ``"neck:0"`` is the first item, ``"backbone:p3"`` item ``p3``.
        preprocess: what the model was trained to see. Of torchvision's objects: their own, when not given.
        classes: names, without a background; label i means ``classes[i]``. A teacher of features needs none.
        call: ``call(model, images_N3HW, batch)`` runs it; ``model(images_N3HW)`` when not given. It is first
            tried on an image of zeros with ``batch.targets`` None. These functions are given the model because
            it may be a copy: an average over training, or that of another process.
        losses: ``losses(model, output, batch)``: of what ``call`` returned in training mode, scalars by name.
            The objects, in pixels of the network input, are in ``batch.targets``.
        decode: ``decode(model, output, batch)``: of what ``call`` returned in evaluation mode, for each image
            ``boxes`` (K, 4) xyxy in pixels of the network input, ``labels`` (K,) in 0…Q-1, ``scores`` (K,).
        kind: what it answers from, as methods have settings for anchors, cells and proposals.
        logits: makes it a segmenter: ``logits(model, output, batch)``, of what ``call`` returned, class logits
            (N, Q, h, w) over the padded input, at any stride. A segmenter needs no ``losses`` to learn: without
            them it has the cross-entropy of these.

    Raises:
        UserError: a tap that is not there, does not run, or does not give what it should; something is missing.

    Example:
        >>> plain = Preprocess(mean=(0, 0, 0), std=(1, 1, 1))
        >>> teacher = wrap(yolo, {8: "model.15", 16: "model.18", 32: "model.21"}, plain)
    """
    _check_arguments(model, taps, preprocess, classes)
    if taps is None:
        given = {"call": call, "losses": losses, "decode": decode, "kind": kind, "logits": logits}
        for name in (name for name, value in given.items() if value is not None):
            raise UserError(f"wrap: {name} goes with taps: give taps={{stride: module name}}")
        if isinstance(model, SSD):
            return TorchvisionSSD(model, classes, preprocess)
        if not isinstance(model, WITHOUT_TAPS):
            raise UserError(
                f"wrap: a {type(model).__name__} has steps of its own: give taps={{stride: module name}}, as "
                f"{{8: {_example(model)!r}}} (`print(model)` shows the names)"
            )
        return wrap_torchvision(model, classes, preprocess)
    if preprocess is None:
        raise UserError(
            "wrap: preprocess is missing: give the normalization that the model was trained with, as "
            "preprocess=Preprocess(mean=(0, 0, 0), std=(1, 1, 1)) for RGB in [0, 1]"
        )
    if (losses or decode or logits) and not classes:
        raise UserError("wrap: classes is missing: name them in the order of the model's labels")
    tapped = Taps(model, taps, preprocess.divisor, call or _call)
    if logits is None:
        return Wrapped(model, tapped, preprocess, classes, losses, decode, kind)
    for name in (name for name, value in {"decode": decode, "kind": kind}.items() if value is not None):
        raise UserError(
            f"wrap: {name} is for detectors, and logits makes it a segmenter: leave one of them out"
        )
    return WrappedSegmenter(model, tapped, preprocess, classes, logits, losses)


def _check_arguments(model: Any, taps: Any, preprocess: Any, classes: Any) -> None:
    """Refuse what is none of these: another library's program, say, is easily taken for the module in it."""
    if isinstance(model, Model):
        raise UserError(f"wrap: a {type(model).__name__} of detdistill needs no wrap: use it as it is")
    if not isinstance(model, nn.Module):
        raise UserError(f"wrap: a {type(model).__name__} is no module: give the torch.nn.Module itself")
    if "mode" not in inspect.signature(model.train).parameters:  # its eval() would begin a training of its own
        raise UserError(
            f"wrap: a {type(model).__name__} is a program around a module (its train() takes no mode): give "
            "the module in it, as `model.model`"
        )
    if taps is not None and not isinstance(taps, Mapping):
        raise UserError(
            f"wrap: taps is a {type(taps).__name__}: give {{stride: module name}}, as {{8: 'neck.p3'}}"
        )
    for stride, tap in (taps or {}).items():
        if not isinstance(stride, int) or stride < 1 or not isinstance(tap, str):
            tap = tap if isinstance(tap, str) else seen(tap)
            raise UserError(
                f"wrap: taps has {stride!r}: {tap}: give {{stride: module name}}, as {{8: 'neck.p3'}}"
            )
    if preprocess is not None and not isinstance(preprocess, Preprocess):
        raise UserError(f"wrap: preprocess is a {type(preprocess).__name__}: give detdistill.Preprocess(…)")
    names_of(classes, "wrap: classes")


def _call(model: nn.Module, images_N3HW: Tensor, batch: Batch) -> Any:
    return model(images_N3HW)


class _Tapped(Model):
    """What every wrapped model does, whatever its task.

    Its weights are a submodule's, as the user has them.
    """

    def __init__(self, model: nn.Module, taps: Taps, preprocess: Preprocess, classes: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.taps = taps
        self.preprocessor = preprocess
        self.classes = tuple(classes)
        self.pyramid_channels = taps.channels

    @property
    def exported(self) -> nn.Module:
        return self.model

    def forward_features(self, batch: Batch) -> TappedPyramid:
        return self.taps.run(self.model, batch)

    def forward_features_only(self, batch: Batch) -> Pyramid:
        return self.taps.run(self.model, batch, stop=True)

    def output(self, pyramid: Pyramid) -> Any:
        """What the model answered in the forward that gave this very pyramid; nothing runs twice."""
        if not isinstance(pyramid, TappedPyramid):
            raise ValueError("a wrapped model predicts from the pyramid that its own `pyramid` returned alone")
        return pyramid.output


class Wrapped(_Tapped, Detector):
    """The five steps of a foreign detector; build it with :func:`wrap`."""

    incomparable = True

    def __init__(
        self,
        model: nn.Module,
        taps: Taps,
        preprocess: Preprocess,
        classes: Sequence[str],
        losses: Losses | None,
        decode: Decode | None,
        kind: Kind | None,
    ) -> None:
        super().__init__(model, taps, preprocess, classes)
        self.kind = kind
        self.can_learn, self.can_predict = losses is not None, decode is not None
        self._losses, self._decode = losses, decode

    def forward_head(self, pyramid: Pyramid, batch: Batch) -> ThirdPartyOutputs:
        return ThirdPartyOutputs(self.output(pyramid))

    def losses(self, outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(outputs, ThirdPartyOutputs)
        if self._losses is None:
            raise UserError("this wrapped model cannot learn: give wrap(..., losses=...)")
        return _scalars(self._losses(self.model, outputs.output, batch))

    def decode(self, outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(outputs, ThirdPartyOutputs)
        if self._decode is None:
            raise UserError("this wrapped model gives no detections: give wrap(..., decode=...)")
        detections = []
        found = self._decode(self.model, outputs.output, batch)
        _check_detections(found, len(batch.sizes), len(self.classes))
        for one, size, original in zip(found, batch.sizes, batch.original_sizes, strict=True):
            order = one["scores"].argsort(descending=True, stable=True)
            one = {name: value[order] for name, value in one.items()}
            ratio_y, ratio_x = original[0] / size[0], original[1] / size[1]
            boxes_K4 = clip_boxes_to_image(one["boxes"], size)
            boxes_K4 = boxes_K4 * boxes_K4.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])
            detections.append({**one, "boxes": boxes_K4})
        return detections


class WrappedSegmenter(_Tapped, Segmenter):
    """The five steps of a foreign segmenter; build it with :func:`wrap` and ``logits``."""

    def __init__(
        self,
        model: nn.Module,
        taps: Taps,
        preprocess: Preprocess,
        classes: Sequence[str],
        logits: Logits,
        losses: Losses | None,
    ) -> None:
        super().__init__(model, taps, preprocess, classes)
        self._logits, self._losses = logits, losses

    def forward_head(self, pyramid: Pyramid, batch: Batch) -> ThirdPartySegmentationOutputs:
        output = self.output(pyramid)
        logits_NQHW = self._logits(self.model, output, batch)
        wanted = (len(batch.images_N3HW), len(self.classes))
        if not isinstance(logits_NQHW, Tensor) or logits_NQHW.ndim != 4 or logits_NQHW.shape[:2] != wanted:
            raise UserError(
                f"logits(model, output, batch) gave {seen(logits_NQHW)}: return a tensor "
                f"({wanted[0]} images, {wanted[1]} classes, rows, columns)"
            )
        return ThirdPartySegmentationOutputs(logits_NQHW, output=output)

    def losses(self, outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(outputs, ThirdPartySegmentationOutputs)
        if self._losses is None:
            return pixel_losses(outputs, batch)
        return _scalars(self._losses(self.model, outputs.output, batch))

    def decode(self, outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        assert isinstance(outputs, SegmentationOutputs)
        return label_maps(outputs, batch)


@dataclass(slots=True)
class ThirdPartySegmentationOutputs(SegmentationOutputs):
    """Logits, beside all that the model answered."""

    output: Any = None


def _scalars(losses: Any) -> dict[str, Tensor]:
    if not isinstance(losses, Mapping) or any(
        not isinstance(value, Tensor) or value.ndim for value in losses.values()
    ):
        raise UserError(
            f"losses(model, output, batch) gave {seen(losses)}: return a dict of scalar tensors by name"
        )
    return dict(losses)


def _check_detections(found: Any, images: int, classes: int) -> None:
    what = "decode(model, output, batch) gave"
    if not isinstance(found, Sequence) or len(found) != images:
        raise UserError(f"{what} {seen(found)}: return a list with a dict for each of the {images} images")
    for one in found:
        if not isinstance(one, Mapping) or not {"boxes", "labels", "scores"} <= one.keys():
            raise UserError(f"{what} {seen(one)} for an image: return a dict of boxes, labels and scores")
        boxes, labels, scores = one["boxes"], one["labels"], one["scores"]
        for name, value in one.items():
            if not isinstance(value, Tensor):
                raise UserError(
                    f"{what} {name} as {seen(value)}: return tensors, as torch.from_numpy(…) makes them"
                )
        shapes = [tuple(x.shape) for x in (boxes, labels, scores)]
        if shapes != [(len(scores), 4), (len(scores),), (len(scores),)] or labels.is_floating_point():
            raise UserError(
                f"{what} {seen(one)} for an image: return boxes (K, 4), labels (K,) of integers, scores (K,)"
            )
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        if low < 0 or high >= max(classes, 1):
            raise UserError(
                f"{what} labels {low} to {high}, and there are {classes} classes: labels count from 0, and a "
                "head with more class rows than `classes` has names must be built anew"
            )


def _example(model: nn.Module) -> str:
    """The last module but the head, or whatever there is."""
    names = [name for name, _ in model.named_children()]
    return (names[-2:] or ["neck"])[0]
