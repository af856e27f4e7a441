"""A student with its teacher: everything that a training step needs, as one module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.distillation.matching import (
    ClassMatch,
    Matching,
    Overlay,
    input_scale,
    match_classes,
    match_levels,
)
from detdistill.distillation.methods import build_method
from detdistill.distillation.responses import SharedClasses, require_readable
from detdistill.distillation.signals import Method, Need, Setting, Signals
from detdistill.distillation.weighting import AUTO_EVERY, AutoWeight, Weight, build_weight, gradient_norm
from detdistill.errors import UserError
from detdistill.models.base import Batch, Model, Pyramid, Raw, Target
from detdistill.models.families.one_stage import OneStage
from detdistill.recipe import MethodConfig, method_config
from detdistill.seeding import mix_seed

logger = logging.getLogger(__name__)

MethodLike = str | Mapping[str, Any] | MethodConfig | Method

HEAD: frozenset[Need] = frozenset({"raw", "hidden"})
"""What only the teacher's head can give."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """Some images, and what the student has made of them."""

    images: Sequence[Tensor]
    targets: Sequence[Target] | None
    zoom: float
    batch: Batch
    pyramid: Pyramid
    raw: Raw | None


class Pair(nn.Module):
    """Computes a student's own losses and, beside them, what it should learn from the teacher.

    The teacher is frozen and in evaluation mode, whatever mode the pair is put in; it follows the pair from
    device to device, but is no submodule: it is in no state dict, optimiser, average or export, and
    DistributedDataParallel does not see it. Methods of weight 0 are not built. Families, input sizes and
    classes of the two may differ; what a method cannot compare then it refuses.

    Args:
        student: trained in place; it is also what is exported.
        teacher: a trained model for the same task, or None for plain training.
        methods: names (``"ima"``), ``{name: {weight: …, option: …}}`` as in a recipe, or Method objects.
        seed: of the methods' randomness.

    Example:
        >>> pair = Pair(student, teacher, ["ima"])
        >>> optimizer = torch.optim.SGD(pair.parameters(), lr=0.01)  # student and adapters
        >>> sum(pair(images, targets).values()).backward()
    """

    def __init__(
        self,
        student: Model,
        teacher: Model | None = None,
        methods: MethodLike | Sequence[MethodLike] = (),
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # a tuple hides it from nn.Module
        self.methods = nn.ModuleDict()
        self.weights: dict[str, Weight] = {}
        self.auto = nn.ModuleDict()
        self.matching: Matching | None = None
        self.classes: ClassMatch | None = None
        self.step, self.total_steps, self.micro_batch = 0, None, 0
        self.seed = seed
        if not student.can_learn:
            raise UserError("the student has no losses: give wrap(..., losses=...)")
        if teacher is None:
            if methods:
                raise UserError("methods need a teacher")
            _require_learnable(student)
            return
        if student.task != teacher.task:
            raise UserError(
                f"the teacher is for {teacher.task} and the student for {student.task}: give both the same task"
            )
        if teacher.exported is student.exported:
            raise UserError("teacher and student are one module: give the teacher a copy (copy.deepcopy)")
        teacher.eval().requires_grad_(False)
        _require_learnable(student)
        scale = input_scale(student.preprocessor, teacher.preprocessor)
        self.matching = match_levels(student.pyramid_channels, teacher.pyramid_channels, scale)
        self.classes = match_classes(student.classes, teacher.classes)
        for item in [methods] if isinstance(methods, str | Mapping | MethodConfig | Method) else methods:
            self._add(item)
        self._tell_of_missing_classes()
        # At each forward DistributedDataParallel sends all buffers of the first process to the others; what all
        # write alike, as CIRKD's gigabyte of memories, need not travel.
        self._ddp_params_and_buffers_to_ignore = [
            f"{place}.{name}"
            for place, module in self.named_modules()
            if getattr(module, "alike_in_all_processes", False)
            for name, _ in module.named_buffers(recurse=False)
        ]

    step: int
    total_steps: int | None
    micro_batch: int

    @property
    def teacher(self) -> Model | None:
        return self._teacher[0]

    def at_step(self, step: int, total_steps: int) -> None:
        """Say where in the run the next forward is: sets the methods' weights and seeds their randomness.

        Further forwards before the next call are the step's other micro-batches: they draw anew. A loop that
        never calls this gets full weights, and each training forward is a step.
        """
        self.step, self.total_steps, self.micro_batch = step, total_steps, 0

    def current_weights(self) -> dict[str, float]:
        """Each method's scheduled weight at this step; during a warm-up already above 0 at the first.

        Without the factors of ``weight: auto``.
        """
        progress = self._progress()
        if progress is None:
            return {name: weight.value for name, weight in self.weights.items()}
        return {name: weight.at(progress) for name, weight in self.weights.items()}

    def applied_weights(self) -> dict[str, float]:
        """Each method's whole weight at this step, to log; waits for the device."""
        weights = self.current_weights()
        return {
            name: weight * (float(self._auto(name).factor) if name in self.auto else 1.0)
            for name, weight in weights.items()
        }

    def without_labels(self) -> list[str]:
        """The methods by which images without labels can teach.

        Raises:
            UserError: there are methods, and all of them need labels.
        """
        able = self._label_free(self.methods)
        if self.methods and not able:
            raise UserError(
                f"{', '.join(self.methods)}: needs labels, and data.unlabelled has none: use ima, mimic, pkd "
                "or another method on features, or leave data.unlabelled out"
            )
        return able

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target],
        zoom: float = 1.0,
        unlabelled: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Every loss term by name, weighted: sum them.

        Args:
            images: (3, H, W) each, uint8 or float in [0, 1].
            targets: for each image ``boxes`` (K, 4) xyxy in pixels and ``labels`` (K,), or, of a segmenter,
                ``semantic`` (H, W).
            zoom: factor on the input sizes of both models.
            unlabelled: more images, as above, from which the methods alone teach, but for those that need
                labels. Each term is then the mean over all images that it has seen.

        Raises:
            UserError: in training, no loss of the student's own has a gradient.
        """
        active = {name: weight for name, weight in self.current_weights().items() if weight > 0}
        batch = self.student.preprocess(images, targets, zoom)
        pyramid = self.student.pyramid(batch)
        raw = _predict(self.student, pyramid, batch, self._needs(active))
        losses = self.student.losses(raw, batch)
        if self.training and torch.is_grad_enabled():
            _require_gradient(losses)
        if not active or self.teacher is None:
            return losses

        if self.teacher.training:
            self.teacher.eval()  # whoever called train() on it
        generator = self._generator(batch.images_N3HW.device)
        terms = self._compare(list(active), _Seen(images, targets, zoom, batch, pyramid, raw), generator)
        self._measure(losses, terms, pyramid)
        free = self._label_free(active)
        if unlabelled and free:
            more = self._compare(free, self._look_at(unlabelled, zoom, self._needs(free)), generator)
            share = len(unlabelled) / (len(images) + len(unlabelled))
            terms |= {name: torch.lerp(terms[name], more[name], share) for name in free}
        for name, weight in active.items():
            if name in losses:
                raise UserError(
                    f"the student's losses have a term {name!r}, as a method is called: name it otherwise in "
                    "wrap(..., losses=...)"
                )
            factor = self._auto(name).factor if name in self.auto else 1.0
            losses[name] = weight * factor * terms[name]
        if self.training and self.total_steps is None:
            self.step += 1
        elif self.training:
            self.micro_batch += 1
        return losses

    def _label_free(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if "labels" not in self._method(name).needs]

    def _needs(self, names: Iterable[str]) -> set[Need]:
        return {need for name in names for need in self._method(name).needs}

    def _look_at(self, images: Sequence[Tensor], zoom: float, needs: set[Need]) -> _Seen:
        """What the student makes of images without labels; its head runs only where it is asked for."""
        batch = self.student.preprocess(images, None, zoom)
        pyramid = self.student.pyramid(batch)
        raw = _predict(self.student, pyramid, batch, needs) if needs else None
        return _Seen(images, None, zoom, batch, pyramid, raw)

    def _compare(self, names: list[str], seen: _Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """The unweighted terms of these methods, by name: the teacher looks at what the student has seen."""
        assert self.teacher is not None
        needs = self._needs(names)
        from_head = bool(needs & HEAD)
        with torch.no_grad():
            teacher_batch = self._teacher_batch(seen)
            look = self.teacher.pyramid if from_head else self.teacher.pyramid_alone
            teacher_pyramid = look(teacher_batch)
            raw = _predict(self.teacher, teacher_pyramid, teacher_batch, needs) if from_head else None
        signals = Signals(
            student=seen.pyramid,
            teacher=teacher_pyramid,
            student_batch=seen.batch,
            teacher_batch=teacher_batch,
            overlay=Overlay(seen.batch, teacher_batch),
            student_raw=seen.raw,
            teacher_raw=raw,
            student_model=self.student,
            teacher_model=self.teacher,
            generator=generator,
            progress=self._progress(),
        )
        return {name: self._method(name)(signals) for name in names}

    def _add(self, item: MethodLike) -> None:
        assert self.matching is not None
        assert self.teacher is not None
        if isinstance(item, Method):
            config, method = MethodConfig.model_construct(name=type(item).__name__.lower()), item
        else:
            config = method_config(item)
            setting = Setting(self.student, self.teacher, self.matching)
            method = build_method(config.name, setting, config.options)
        name = config.name
        if method.needs & HEAD:
            require_readable(self.student, self.teacher, name)
        if name in self.methods:
            raise UserError(f"method {name!r} is given twice")
        weight, auto = build_weight(config, self.student.kind)
        if weight.value > 0:
            self.methods[name], self.weights[name] = method, weight
            if auto is not None:
                self.auto[name] = auto

    def _tell_of_missing_classes(self) -> None:
        assert self.classes is not None
        names = [
            name
            for name, method in self.methods.items()
            if any(isinstance(part, SharedClasses) for part in method.modules())
        ]
        if names and self.classes.missing:
            logger.warning(
                "the teacher does not know %s: %s cannot teach the student these classes",
                ", ".join(self.classes.missing),
                ", ".join(names),
            )

    def _method(self, name: str) -> Method:
        method = self.methods[name]
        assert isinstance(method, Method)
        return method

    def _auto(self, name: str) -> AutoWeight:
        weight = self.auto[name]
        assert isinstance(weight, AutoWeight)
        return weight

    def _progress(self) -> float | None:
        return None if self.total_steps is None else (self.step + 1) / (self.total_steps + 1)

    def _measure(self, losses: Mapping[str, Tensor], terms: Mapping[str, Tensor], pyramid: Pyramid) -> None:
        """Now and then, let the weights that look after themselves see both gradients."""
        names = [name for name in terms if name in self.auto]
        due = self.step % AUTO_EVERY == 0 and self.micro_batch == 0
        if not names or not due or not (self.training and torch.is_grad_enabled()):
            return
        task = gradient_norm(torch.stack(list(losses.values())).sum(), pyramid)
        for name in names:
            self._auto(name).update(task, gradient_norm(terms[name], pyramid))

    def _teacher_batch(self, seen: _Seen) -> Batch:
        assert self.teacher is not None
        if self.teacher.preprocessor == self.student.preprocessor:
            return seen.batch  # the same pixels: nothing to do twice
        return self.teacher.preprocess(seen.images, seen.targets, seen.zoom)

    def _generator(self, device: torch.device) -> torch.Generator:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        generator = torch.Generator(device)
        return generator.manual_seed(mix_seed(self.seed, rank, self.step, self.micro_batch))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pair:
        """What ``.to`` and its kin call: the teacher follows."""
        if self.teacher is not None:
            self.teacher._apply(fn)
        super()._apply(fn, recurse)
        return self


def _require_learnable(student: Model) -> None:
    """Some libraries save their models frozen, and a model that was a teacher is: it would learn nothing."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError("no parameter of the student has requires_grad: call requires_grad_(True) on the model")


def _require_gradient(losses: Mapping[str, Tensor]) -> None:
    if not any(value.requires_grad for value in losses.values()):
        what = "is empty" if not losses else f"was detached ({', '.join(losses)})"
        raise UserError(
            f"the student's loss has no gradient: what losses() gave {what}; return scalars that depend on the "
            "model's output, without .item(), .detach() or no_grad, also for images without objects"
        )


def _predict(model: Model, pyramid: Pyramid, batch: Batch, needs: set[Need]) -> Raw:
    if "hidden" not in needs:
        return model.predict(pyramid, batch)
    assert isinstance(model, OneStage), "a method that needs tower maps checks this when it is built"
    return model.predict(pyramid, batch, hidden=True)
