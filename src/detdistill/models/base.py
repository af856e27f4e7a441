"""The five steps of a model, be it a detector or a segmenter, and the objects that pass between them.

::

    images, targets ─preprocess─▶ Batch ─pyramid─▶ Pyramid ─predict─▶ Raw ─┬─losses─▶ {name: scalar}
                                                                           └─decode─▶ list of detections

Shape legend: N images, C channels, H W rows and columns, K objects of an image, Q classes, A anchors a cell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from detdistill.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Batch, Preprocess, Target
from detdistill.recipe import ModelConfig

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "Candidates",
    "DenseOutputs",
    "Detections",
    "Detector",
    "ExportableDetector",
    "HeadOutputs",
    "Kind",
    "Model",
    "Preprocess",
    "Pyramid",
    "QueryOutputs",
    "SegmentationOutputs",
    "Segmenter",
    "TappedPyramid",
    "Target",
    "Task",
    "ThirdPartyOutputs",
    "TwoStageOutputs",
    "dense",
    "eval_mode",
]

Pyramid = dict[int, Tensor]
"""Feature maps by stride: ``{8: (N, C, H/8, W/8), 16: …}``."""

Detections = dict[str, Tensor]
"""``boxes`` (K, 4) xyxy in pixels of the original image, ``labels`` (K,), ``scores`` (K,) falling; from
detectors with masks also ``masks`` (K, 1, H, W), each pixel's probability, as large as the original image.
A segmenter's have ``semantic`` alone, (H, W) int64: the class of each pixel of the original image."""

Kind = Literal["anchor", "anchor_free", "two_stage", "queries", "segmentation"]
"""What a model answers from: anchors, cells, proposals, or pixels. Published settings of methods go by it."""

Task = Literal["detection", "segmentation"]
"""What a model is for: what its targets hold, and by what number it is measured."""


@dataclass(slots=True)
class DenseOutputs:
    """Outputs of a dense head before any sigmoid, by stride.

    Attributes:
        cls: (N, A·Q, H, W) class logits (A = 1 for anchor-free heads).
        box: (N, A·E, H, W) box regression, in the head's own encoding of E numbers (mostly 4).
        centerness: (N, 1, H, W) logits, or None where the head has none.
        initial_box: the first boxes of a head that refines them, encoded as ``box``, or None.
        hidden: where they were asked for, the class and the box tower's maps before the ReLU of each block.
    """

    cls: Pyramid
    box: Pyramid
    centerness: Pyramid | None = None
    initial_box: Pyramid | None = None
    tower_features: list[tuple[Pyramid, Pyramid]] | None = None


@dataclass(slots=True)
class TwoStageOutputs:
    """Outputs of a two-stage detector before any softmax; R proposals over the whole batch.

    Attributes:
        rpn: the region proposal network's dense outputs (Q = 1: objectness).
        proposals: per image (R_n, 4) xyxy in network input; in training the sampled ones.
        roi_logits_RQ: (R, Q + 1) class logits, background at index 0.
        roi_deltas_RQ4: (R, 4·(Q + 1)) box deltas; those of a class-agnostic head are the same for every class.
        roi_labels: in training, per image the sampled proposals' labels (0 is background), else None.
        roi_targets: in training, per image the sampled proposals' regression targets (R_n, 4), else None.
        mask_logits: in training of a detector with masks, (M, 28, 28): for each sampled proposal that answers
            for an object the mask of its class; else None.
        mask_targets: what they should be, (M, 28, 28) in [0, 1], else None.
        pyramid: what a detector makes its detections' masks from, in ``decode``; None without masks.
        later: of a cascade, what its later stages say of the boxes that the stage before them refined; each has
            this ``rpn``, and no ``later`` of its own.
    """

    rpn: DenseOutputs
    proposals: list[Tensor]
    roi_logits_RQ: Tensor
    roi_deltas_RQ4: Tensor
    roi_labels: list[Tensor] | None = None
    roi_targets: list[Tensor] | None = None
    mask_logits: Tensor | None = None
    mask_targets: Tensor | None = None
    pyramid: Pyramid | None = None
    later: Sequence[TwoStageOutputs] = ()


@dataclass(slots=True)
class QueryOutputs:
    """Outputs of a detector that answers from S queries (the DETRs), before any sigmoid of the scores.

    Attributes:
        logits_NSQ: (N, S, Q) class logits of the last decoder layer.
        boxes_NS4: (N, S, 4) center and size, over the padded input's width and height.
        outputs: what the losses want beside them (earlier layers, noised objects), as transformers has it.
    """

    logits_NSQ: Tensor
    boxes_NS4: Tensor
    outputs: Any


@dataclass(slots=True)
class ThirdPartyOutputs:
    """What a model that this project did not write answered, in a form of its own."""

    output: Any


@dataclass(slots=True)
class SegmentationOutputs:
    """Outputs of a segmenter before any softmax, at its own stride: nothing is resized yet.

    Attributes:
        logits_NQHW: (N, Q, H, W) class logits.
        aux_NQHW: in training, those of an auxiliary head on an earlier map, where there is one; else None.
    """

    logits_NQHW: Tensor
    aux_NQHW: Tensor | None = None


SETTINGS = ("score_threshold", "nms_threshold", "max_detections", "topk_candidates", "window")
"""Options of a section that are attributes of its model, which may be set anew."""

SOURCES = {"weights", "backbone_weights"}

HeadOutputs = DenseOutputs | TwoStageOutputs | QueryOutputs | ThirdPartyOutputs | SegmentationOutputs


class TappedPyramid(dict[int, Tensor]):
    """A pyramid that remembers, for ``predict``, what else the model gave in the same forward.

    Attributes:
        output: a wrapped model's answer, None where it was not let finish; a segmenter's map for its
            auxiliary head.
    """

    output: Any = None


def dense(head_outputs: HeadOutputs) -> DenseOutputs:
    """The outputs on the pyramid: a one-stage detector's own, a two-stage detector's proposals network."""
    assert isinstance(head_outputs, DenseOutputs | TwoStageOutputs), (
        "methods on dense outputs refuse other pairs when they are built"
    )
    return head_outputs.rpn if isinstance(head_outputs, TwoStageOutputs) else head_outputs


class Model(nn.Module, ABC):
    """A model in five steps; ``forward`` composes them exactly as torchvision's detectors do.

    Its children are :class:`Detector` and :class:`Segmenter`: pairs, training and files know only this.

    Attributes:
        task: what it is for.
        family: its name in recipes (`family`); None: a model of no family here.
        kind: what it answers from; None, something else: methods then have their plain defaults.
        classes: class names; label i means ``classes[i]``.
        category_ids: by label, those of the data that it was trained on; None: they had none, or are unknown.
        preprocessor: the input convention.
        pyramid_channels: ``{stride: channels}`` of what ``forward_features`` returns.
        pyramid_norms: ``{stride: BatchNorm}`` of the levels whose map is the very output of a BatchNorm; none
            unless a model says so.
        needs_masks: whether it learns from the targets' ``masks``; its detections have masks, too.
        config: the section that describes it, where it was built from one.
        opaque: whether its raw predictions have a form of their own, which no method can compare.
        can_learn: whether it has losses.
        can_answer: whether it has a decode.
    """

    task: ClassVar[Task]
    family: str | None = None
    kind: Kind | None = None
    needs_masks: bool = False
    classes: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None
    preprocessor: Preprocess
    pyramid_channels: dict[int, int]
    pyramid_norms: Mapping[int, nn.BatchNorm2d] = MappingProxyType({})
    config: ModelConfig | None = None
    incomparable: ClassVar[bool] = False
    can_learn: bool = True
    can_predict: bool = True

    @property
    def spec(self) -> dict[str, Any] | None:
        """How to build this model again, as its file says it: of the model as it is now, not as it was built.

        None for a model that no section describes.
        """
        if self.config is None:
            return None
        now = {name: getattr(self, name) for name in SETTINGS if hasattr(self, name)}
        now |= {name: getattr(self.preprocessor, name) for name in ("size", "keep_ratio")}
        changed = {name: value for name, value in now.items() if name in type(self.config).model_fields}
        return {
            # Where weights came from is the run's affair: a file carries no paths of the machine that made it.
            "model": self.config.model_copy(update=changed).model_dump(mode="json", exclude=SOURCES),
            "classes": list(self.classes),
            "mean": list(self.preprocessor.mean),
            "std": list(self.preprocessor.std),
        } | ({} if self.category_ids is None else {"category_ids": list(self.category_ids)})

    @property
    def description(self) -> str:
        """Family and backbone, in a word or two."""
        if self.config is None:
            return type(self).__name__
        return f"{self.config.family} {getattr(self.config, 'backbone', '')}".strip()

    def preprocess(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None, scale_factor: float = 1.0
    ) -> Batch:
        """Resize, normalize and pad; scale the targets likewise.

        Raises:
            ValueError: in training, the targets lack what the model learns from.
        """
        with_masks = self.needs_masks and self.training
        wanted = ["semantic"] if self.task == "segmentation" else ["boxes", *["masks"] * with_masks]
        missing = [name for name in wanted if any(name not in target for target in targets or ())]
        if missing == ["masks"]:
            raise ValueError(
                f"{type(self).__name__} learns from masks, and these targets have boxes only: give each target "
                f"`masks` (K, H, W), or train the family without masks (faster_rcnn, cascade_rcnn)"
            )
        if missing and self.training:
            raise ValueError(
                f"{type(self).__name__} is for {self.task}: give each target `{missing[0]}` "
                + ("(H, W) of class indices" if self.task == "segmentation" else "(K, 4) and `labels` (K,)")
            )
        if targets is not None and self.training:
            self._require_targets(len(images), targets)
        return self.preprocessor(images, targets, scale_factor, with_masks=with_masks)

    def _require_targets(self, images: int, targets: Sequence[Target]) -> None:
        """Refuse targets that would train something else in silence; values, where looking costs no wait.

        Raises:
            ValueError: not one for each image, or boxes or labels that are none.
        """
        if len(targets) != images:
            raise ValueError(f"{images} images have {len(targets)} targets: give one for each image")
        if self.task == "segmentation":
            return
        for i, target in enumerate(targets):
            boxes_K4, labels_K = target["boxes"], target["labels"]
            if boxes_K4.shape != (len(labels_K), 4):
                raise ValueError(
                    f"target {i} has boxes of shape {tuple(boxes_K4.shape)} and {len(labels_K)} labels: give "
                    "boxes (K, 4) and labels (K,)"
                )
            if boxes_K4.device.type != "cpu" or not len(labels_K):
                continue
            corners_K4, numbers_K = boxes_K4.detach().numpy(), labels_K.numpy()
            if not (corners_K4[:, 2:] >= corners_K4[:, :2]).all():  # NaN is not either
                raise ValueError(f"target {i} has a box that is not (x1, y1, x2, y2) with x1 ≤ x2 and y1 ≤ y2")
            least, most = int(numbers_K.min()), int(numbers_K.max())
            if not 0 <= least <= most < len(self.classes):
                raise ValueError(
                    f"target {i} has the label {most if least >= 0 else least}: labels are 0 to "
                    f"{len(self.classes) - 1}, without a background"
                )

    @abstractmethod
    def forward_features(self, batch: Batch) -> Pyramid:
        """Backbone and neck."""

    def forward_features_only(self, batch: Batch) -> Pyramid:
        """As :meth:`pyramid`, for those who will not ask ``predict``: no more need run than it takes."""
        return self.forward_features(batch)

    @property
    def exported(self) -> nn.Module:
        """The module whose weights are what a user gets: of a wrapped model, the model itself."""
        return self

    @abstractmethod
    def forward_head(self, pyramid: Pyramid, batch: Batch) -> HeadOutputs:
        """Head outputs before any sigmoid. In training a two-stage detector samples its proposals here."""

    @abstractmethod
    def losses(self, head_outputs: HeadOutputs, batch: Batch) -> dict[str, Tensor]:
        """Ground-truth losses under torchvision's names; ``batch.targets`` must be there."""

    @abstractmethod
    def decode(self, head_outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        """Detections in pixels of the original images; a segmenter's label maps, of their sizes."""

    def predict(self, batch: Batch) -> list[Detections]:
        """From a batch to detections: pyramid, predict and decode, for those who want no more."""
        return self.decode(self.forward_head(self.forward_features(batch), batch), batch)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses in training mode, detections in evaluation mode."""
        if not self.training:
            return self.predict(self.preprocess(images))
        if targets is None:
            raise ValueError("in training mode a model needs targets; call model.eval() for detections")
        batch = self.preprocess(images, targets)
        return self.losses(self.forward_head(self.forward_features(batch), batch), batch)


class Detector(Model):
    """A model that finds boxes: its targets have ``boxes`` and ``labels``."""

    task = "detection"


class Candidates(NamedTuple):
    """What may be detections: always as many, so that a graph of fixed shapes can hold them.

    Attributes:
        boxes_NM4: float32 xyxy in pixels of the input, perhaps not clipped.
        scores_NM: float32; 0 where a candidate's class score is not above the detector's threshold.
        labels_NM: int64.
        masks_NMSS: of a detector with masks, float32 in [0, 1]: each within its box; else None. Suppression by
            class has then been done: to draw all that it leaves out would cost too much.
    """

    boxes_NM4: Tensor
    scores_NM: Tensor
    labels_NM: Tensor
    masks_NMSS: Tensor | None = None


class ExportableDetector(Detector):
    """A detector whose candidates have a fixed number: it can be traced, without its last suppression.

    Attributes:
        score_threshold: class scores up to it are no candidates.
        nms_threshold: of the suppression by class that makes detections of candidates; None: there is none.
        max_detections: of an image.
        drop_empty: boxes without an area inside the image are left out before suppression.
        needs_sizes: ``candidates`` reads ``batch.sizes``, as it looks inside boxes that it clips.
        any_batch: it can be traced for any number of images; else for one.
    """

    score_threshold: float
    nms_threshold: float | None
    max_detections: int
    drop_empty: bool = False
    needs_sizes: ClassVar[bool] = False
    any_batch: ClassVar[bool] = True

    @abstractmethod
    def candidates(self, batch: Batch) -> Candidates:
        """From a batch to candidates, with no step whose shapes depend on what is found.

        Args:
            batch: ``images_N3HW`` and, where ``needs_sizes``, ``sizes`` as tensors (2,) are all that is read.
        """


class Segmenter(Model):
    """A model that gives every pixel a class: its targets have ``semantic``, (H, W), 255 = ignore."""

    task = "segmentation"
    kind = "segmentation"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own: frozen BatchNorm layers stay as they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
