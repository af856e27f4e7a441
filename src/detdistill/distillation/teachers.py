"""What a teacher is: anything that can say something about images.

:class:`LiveTeacher` runs a model. Whatever else can answer :meth:`Teacher.observe` is a teacher, too; a
method that requires what a teacher does not provide is refused when it is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from detdistill.models.base import Batch, HeadOutputs, Model, Pyramid, Target
from detdistill.models.families.one_stage import OneStage
from detdistill.models.preprocess import Preprocess

Signal = Literal["features", "outputs", "tower_features"]
"""What a teacher can say of an image: feature maps by stride, raw head outputs, and in these the maps of the
head's towers."""

FEATURES: frozenset[Signal] = frozenset({"features"})
HEAD: frozenset[Signal] = frozenset({"outputs", "tower_features"})
"""What only a head can say."""


@dataclass(slots=True)
class Samples:
    """Images of one forward pass, as everybody who looks at them gets them.

    Attributes:
        images: (3, H, W) each, uint8 or float in [0, 1].
        targets: for each image ``boxes`` (K, 4) xyxy in pixels and ``labels`` (K,), or, of a segmenter,
            ``semantic`` (H, W); None of images without labels.
        scale_factor: factor on the input sizes of all models.
        keys: the name of each image in its data set, where it is known.
        views: the seed of each image's augmentation, where it is known; None: the image is as in its file.
            Within one run and one split, key and view identify the pixels; a cache that outlives the run
            needs the data set and the augmentation settings as well.
    """

    images: Sequence[Tensor]
    targets: Sequence[Target] | None = None
    scale_factor: float = 1.0
    keys: tuple[str, ...] | None = None
    views: tuple[int | None, ...] | None = None
    _batches: list[tuple[Preprocess, Batch]] = field(default_factory=list, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, model: Model) -> Batch:
        """The network input of this model. Models of equal preprocessing share one."""
        with_masks = model.needs_masks and model.training
        for preprocess, batch in self._batches:
            has_masks = all("masks" in target for target in batch.targets or ())
            if preprocess == model.preprocessor and (has_masks or not with_masks):
                return batch
        batch = model.preprocess(self.images, self.targets, self.scale_factor)
        self._batches.append((model.preprocessor, batch))
        return batch

    def to(self, device: torch.device) -> Samples:
        """Copied to the device, without waiting for it."""
        images = [image.to(device, non_blocking=True) for image in self.images]
        targets = None
        if self.targets is not None:
            targets = [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in self.targets]
        return Samples(images, targets, self.scale_factor, self.keys, self.views)


@dataclass(slots=True)
class TeacherView:
    """What a teacher says of some images.

    Attributes:
        batch: the images as its model sees them.
        features: maps (N, C, H, W) by stride, without gradient.
        outputs: raw head outputs, where they were asked for.
        model: the model itself, frozen; gradient may pass through it.
    """

    batch: Batch
    features: Pyramid
    outputs: HeadOutputs | None
    model: Model


@runtime_checkable
class Teacher(Protocol):
    """Whatever a student can learn from."""

    @property
    def name(self) -> str:
        """By which terms and messages call it."""

    @property
    def model(self) -> Model:
        """The model, for what methods read from it: family, classes, channels, preprocessing."""

    @property
    def provides(self) -> frozenset[Signal]:
        """What it can be asked for."""

    def observe(self, samples: Samples, requires: frozenset[Signal]) -> TeacherView:
        """What it says of these images; it computes only what is required."""


class LiveTeacher:
    """A trained model that runs at every step.

    The model is frozen and in evaluation mode, whatever anybody does with it in between. A LiveTeacher is no
    module: no optimizer, average, checkpoint, export or DistributedDataParallel sees it. It follows the
    images to their device.

    Args:
        model: a trained model; it is frozen in place.
        name: by which messages call it.
    """

    def __init__(self, model: Model, name: str = "teacher") -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)

    @property
    def provides(self) -> frozenset[Signal]:
        if self.model.incomparable:
            return FEATURES
        return FEATURES | (HEAD if isinstance(self.model, OneStage) else HEAD - {"tower_features"})

    @torch.no_grad()
    def observe(self, samples: Samples, requires: frozenset[Signal]) -> TeacherView:
        model, device = self.model, samples.images[0].device
        if model.training:
            model.eval()
        if next(model.parameters()).device != device:
            model.to(device)
        batch = samples.batch(model)
        if not requires & HEAD:
            return TeacherView(batch, model.forward_features_only(batch), None, model)
        features = model.forward_features(batch)
        return TeacherView(batch, features, head_outputs(model, features, batch, requires), model)


def head_outputs(model: Model, features: Pyramid, batch: Batch, requires: frozenset[Signal]) -> HeadOutputs:
    """Raw head outputs, with the maps of the towers where they are required."""
    if "tower_features" not in requires:
        return model.forward_head(features, batch)
    assert isinstance(model, OneStage), "a method that needs tower maps checks this when it is built"
    return model.forward_head(features, batch, tower_features=True)
