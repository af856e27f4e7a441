"""What methods on head outputs share: which pairs of heads can be compared, and how.

Shape legend: N images, P anchors of all levels (finest level first, rows, columns, anchors), Q classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detdistill.distillation.levels import describe_input, same_grid
from detdistill.distillation.method import PairContext, StepOutputs
from detdistill.distillation.regions import from_input_to_input
from detdistill.errors import UserError
from detdistill.models.base import DenseOutputs, Model, SegmentationOutputs, Target, TwoStageOutputs
from detdistill.models.families.detr import DETR
from detdistill.models.families.faster_rcnn import FasterRCNN
from detdistill.models.families.fcos import FCOS
from detdistill.models.families.one_stage import OneStage
from detdistill.models.families.retinanet import RetinaNet
from detdistill.models.layers.heads import DenseHead, flatten_maps, mean_sides
from detdistill.models.third_party.torchvision import TorchvisionFCOS, TorchvisionRetinaNet

SEGMENTATION = "segmentation"
OF_OBJECTS = ("boxes", "labels", "masks")  # entries of a target with a row for each object
INSTEAD = "use a method on features, such as ima, pkd or mgd"


ALIKE: tuple[tuple[type[Model], ...], ...] = (
    (RetinaNet, TorchvisionRetinaNet),
    (FCOS, TorchvisionFCOS),
    (FasterRCNN,),  # and what is built on it: Mask R-CNN, and Cascade R-CNN, whose first head is meant
)
"""Detectors whose outputs mean the same beside those of one class; their subclasses are among them."""


def require_alike_heads(context: PairContext, name: str, instead: str = INSTEAD) -> None:
    """Refuse a pair whose predictions do not stand for the same things, one by one, and say what to do instead.

    Raises:
        UserError: another family, other levels or anchors, another input size.
    """
    student, teacher = context.student, context.teacher
    require_readable(student, teacher, name, instead)
    for model in (student, teacher):
        if isinstance(model, DETR):
            raise UserError(
                f"{name} compares predictions place by place, and a DETR's queries have none: {instead}"
            )
    if type(student) is not type(teacher) and not any(
        isinstance(student, kinds) and isinstance(teacher, kinds) for kinds in ALIKE
    ):
        both = f"{type(student).__name__} and {type(teacher).__name__}"
        raise UserError(f"{name} compares predictions, and those of {both} differ in kind: {instead}")
    require_same_grid(context, name, instead)
    assert isinstance(student, OneStage | FasterRCNN)
    assert isinstance(teacher, OneStage | FasterRCNN)
    if not _same_anchors(student, teacher):
        raise UserError(
            f"{name} compares predictions anchor by anchor: give both the same anchor_scale and convention, or "
            f"{instead}"
        )


def require_same_grid(context: PairContext, name: str, instead: str = INSTEAD) -> None:
    """Raises:
    UserError: the levels of the two, or the cells of a level, are not the same.
    """
    student, teacher = context.student, context.teacher
    if list(student.pyramid_channels) != list(teacher.pyramid_channels):
        strides = list(teacher.pyramid_channels)
        raise UserError(
            f"{name} compares predictions level by level: give the student the teacher's strides {strides}, or "
            f"{instead}"
        )
    if not same_grid(student.preprocessor, teacher.preprocessor):
        ours, theirs = (describe_input(model.preprocessor) for model in (student, teacher))
        raise UserError(
            f"{name} compares predictions cell by cell, and the inputs differ ({ours}; the teacher's {theirs}"
            f"): give both the same `size`, or {instead}"
        )


def _same_anchors(student: OneStage | FasterRCNN, teacher: OneStage | FasterRCNN) -> bool:
    ours, theirs = ([x.cpu() for x in model.anchor_generator.cell_anchors] for model in (student, teacher))
    steps = {model.convention == "torchvision" for model in (student, teacher)}
    alike = [a.shape == b.shape and torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True)]
    return len(steps) == 1 and all(alike)


def pixel_logits(step: StepOutputs, classes: SharedClasses) -> tuple[Tensor, Tensor]:
    """Class logits (N, Q, H, W) of two segmenters, of the shared classes, on the cells of the teacher's."""
    student, teacher = step.student_outputs, step.teacher_outputs
    assert isinstance(student, SegmentationOutputs)
    assert isinstance(teacher, SegmentationOutputs)
    return classes(step.alignment(student.logits_NQHW, teacher.logits_NQHW), teacher.logits_NQHW, dim=1)


def two_stage(context: PairContext) -> bool:
    """Whether both second stages can be asked about any regions."""
    return isinstance(context.student, FasterRCNN) and isinstance(context.teacher, FasterRCNN)


def require_readable(student: Model, teacher: Model, name: str, instead: str = INSTEAD) -> None:
    """Raises:
    UserError: the predictions of one of them have a form of their own.
    """
    for model in (student, teacher):
        if model.incomparable:
            raise UserError(
                f"{name} compares predictions, and those of a {type(model).__name__} have a form of their own: "
                f"{instead}"
            )


class SharedClasses(nn.Module):
    """Cuts class outputs of student and teacher down to the classes that both know, in the student's order.

    Where both have the same classes in the same order nothing is cut, and nothing copied. Nothing here is
    learnt or saved.

    Args:
        setting: the pair.
        name: of the method.
        background: class outputs have the background, which is shared, as their first row.
        instead: what to do about it, where no class is shared.

    Raises:
        UserError: no class is shared.
    """

    student_rows: Tensor
    teacher_rows: Tensor
    teacher_labels: Tensor

    def __init__(
        self, context: PairContext, name: str, *, background: bool = False, instead: str = INSTEAD
    ) -> None:
        super().__init__()
        match = context.classes
        if not match.pairs:
            ours, theirs = (", ".join(model.classes) or "none" for model in (context.student, context.teacher))
            raise UserError(
                f"{name} compares classes by name, and none is shared (the student's: {ours:.60}; the "
                f"teacher's: {theirs:.60}): {instead}"
            )
        self.same, self.missing = match.same, bool(match.missing)
        first = int(background)
        self.student_count, self.teacher_count = (
            first + len(model.classes) for model in (context.student, context.teacher)
        )
        rows = [(0, 0)] * first + [(ours + first, theirs + first) for ours, theirs in match.pairs]
        known = dict(match.pairs)
        labels = [known.get(label, -1) for label in range(len(context.student.classes))]
        device = next(context.student.parameters()).device
        for buffer, values in (
            ("student_rows", [ours for ours, _ in rows]),
            ("teacher_rows", [theirs for _, theirs in rows]),
            ("teacher_labels", labels),
        ):
            self.register_buffer(buffer, torch.tensor(values, device=device), persistent=False)

    def forward(self, student: Tensor, teacher: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Both, with the shared classes alone in this dimension."""
        return self.student(student, dim), self.teacher(teacher, dim)

    def student(self, x: Tensor, dim: int = -1) -> Tensor:
        """The student's, with the shared classes alone in this dimension, which may be A·Q of A anchors."""
        return x if self.same else _take(x, self.student_rows, self.student_count, dim)

    def teacher(self, x: Tensor, dim: int = -1) -> Tensor:
        """The teacher's, likewise."""
        return x if self.same else _take(x, self.teacher_rows, self.teacher_count, dim)

    def teacher_targets(self, targets: Sequence[Target]) -> list[Target]:
        """The objects under the teacher's labels, those that it has no label for left out."""
        if self.same:
            return list(targets)
        relabeled = [{**target, "labels": self.teacher_labels[target["labels"]]} for target in targets]
        if not self.missing:
            return relabeled
        # How many are left is known on the device alone: here, and only here, the host waits for it.
        kept = [target["labels"] >= 0 for target in relabeled]
        return [
            {key: value[keep] if key in OF_OBJECTS else value for key, value in target.items()}
            for target, keep in zip(relabeled, kept, strict=True)
        ]


def _take(x: Tensor, rows_Q: Tensor, count: int, dim: int) -> Tensor:
    """These rows of each of the groups of ``count`` along the dimension."""
    groups = x.shape[dim] // count
    if groups > 1:
        rows_Q = (torch.arange(groups, device=rows_Q.device)[:, None] * count + rows_Q).flatten()
    return x.index_select(dim, rows_Q)


def class_logits(outputs: DenseOutputs, num_classes: int) -> Tensor:
    """(N, P, Q) float32."""
    return torch.cat(flatten_maps(outputs.cls.values(), num_classes), dim=1)


def box_outputs(outputs: DenseOutputs, head: DenseHead) -> Tensor:
    """(N, P, E) float32, in the head's own encoding; of sides that are distributions the means, (N, P, 4)."""
    encoded_NPE = torch.cat(flatten_maps(outputs.box.values(), head.box_width), dim=1)
    return encoded_NPE if head.bins is None else mean_sides(encoded_NPE, head.bins)


def tempered_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature² · KL(softmax(teacher / temperature) || softmax(student / temperature)), by rows.

    Summed over the last dimension: (...) for logits (..., B).
    """
    ours, theirs = ((logits / temperature).log_softmax(dim=-1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def on_levels(outputs: DenseOutputs, strides: Iterable[int]) -> DenseOutputs:
    """Class and box outputs of these levels alone."""
    strides = list(strides)
    return DenseOutputs(
        {stride: outputs.cls[stride] for stride in strides}, {stride: outputs.box[stride] for stride in strides}
    )


@dataclass(slots=True)
class RegionResponses:
    """Both second stages on the same regions: shared classes alone, the background first.

    Attributes:
        student_logits_RQ, teacher_logits_RQ: (R, Q + 1).
        student_deltas_RQ4, teacher_deltas_RQ4: (R, 4·(Q + 1)).
        labels: per image the regions' labels (0 is background), where they were sampled; else None.
    """

    student_logits_RQ: Tensor
    teacher_logits_RQ: Tensor
    student_deltas_RQ4: Tensor
    teacher_deltas_RQ4: Tensor
    labels: list[Tensor] | None


def region_responses(step: StepOutputs, classes: SharedClasses) -> RegionResponses:
    """Ask both second stages about the student's regions, the teacher's where they are in its own input."""
    outputs, teacher = step.student_outputs, step.teacher_model
    assert isinstance(outputs, TwoStageOutputs)
    assert isinstance(teacher, FasterRCNN)
    sizes = zip(step.student_batch.sizes, step.teacher_batch.sizes, strict=True)
    regions = [from_input_to_input(boxes, *pair) for boxes, pair in zip(outputs.proposals, sizes, strict=True)]
    with torch.no_grad():
        theirs = teacher.classify(step.teacher, regions, step.teacher_batch)
    return _shared(classes, (outputs.roi_logits_RQ, outputs.roi_deltas_RQ4), theirs, outputs.roi_labels)


def teacher_region_responses(step: StepOutputs, classes: SharedClasses) -> RegionResponses:
    """Ask both about regions that the teacher samples from its own proposals, by the method's own draws."""
    student, teacher = step.student_model, step.teacher_model
    assert isinstance(student, FasterRCNN)
    assert isinstance(teacher, FasterRCNN)
    with own_draws(step.generator):
        samples = teacher.sample(step.teacher, step.teacher_batch)
    sampled = [sample.proposals_R4 for sample in samples]
    sizes = zip(step.teacher_batch.sizes, step.student_batch.sizes, strict=True)
    regions = [from_input_to_input(boxes, *pair) for boxes, pair in zip(sampled, sizes, strict=True)]
    with torch.no_grad():
        theirs = teacher.classify(step.teacher, sampled, step.teacher_batch)
    ours = student.classify(step.student, regions, step.student_batch)
    return _shared(classes, ours, theirs, [sample.labels_R for sample in samples])


def _shared(
    classes: SharedClasses,
    ours: tuple[Tensor, Tensor],
    theirs: tuple[Tensor, Tensor],
    labels: list[Tensor] | None,
) -> RegionResponses:
    """The shared classes' rows of two second stages' logits and deltas."""
    ours_RQ, theirs_RQ = classes(ours[0], theirs[0])
    # Deltas are in shares of the region's own sides: they mean the same in either input.
    ours_RQ4, theirs_RQ4 = classes(ours[1].unflatten(1, (-1, 4)), theirs[1].unflatten(1, (-1, 4)), dim=1)
    return RegionResponses(ours_RQ, theirs_RQ, ours_RQ4.flatten(1), theirs_RQ4.flatten(1), labels)


@contextmanager
def own_draws(generator: torch.Generator) -> Iterator[None]:
    """For ground-truth losses, which sample anchors and regions from the global random state.

    Within it that state is what the generator's seed says; after it, it is as before.
    """
    devices = [generator.device] if generator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(generator.initial_seed())
        yield
