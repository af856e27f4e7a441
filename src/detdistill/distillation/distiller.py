"""Students that learn from teachers: the terms of a loss, what an optimizer sees, who looks at what."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.distillation.alignment import Alignment
from detdistill.distillation.levels import Matching, input_scale, match_levels
from detdistill.distillation.method import Method, PairContext, Requirement, StepOutputs
from detdistill.distillation.methods import build_method
from detdistill.distillation.outputs import SharedClasses, require_readable
from detdistill.distillation.teachers import (
    FEATURES,
    HEAD,
    LiveTeacher,
    Samples,
    Signal,
    Teacher,
    TeacherView,
    head_outputs,
)
from detdistill.distillation.weighting import AUTO_EVERY, AutoWeight, Weight, build_weight, gradient_norm
from detdistill.errors import UserError
from detdistill.models.base import Batch, HeadOutputs, Model, Pyramid
from detdistill.recipe import MethodConfig, method_config
from detdistill.seeding import mix_seed

logger = logging.getLogger(__name__)

MethodLike = str | Mapping[str, Any] | MethodConfig | Method

Views = Mapping[str, TeacherView]
"""What each teacher, by its name, says of some images."""


class Term(nn.Module):
    """One term of a student's loss: a method, the teacher that it compares with, and its weight over the run.

    Its learnable parts, such as adapters, are in ``method``; ``auto`` is the factor of ``weight: auto``.
    """

    def __init__(self, method: Method, teacher: str, weight: Weight, auto: AutoWeight | None = None) -> None:
        super().__init__()
        self.method, self.auto = method, auto
        self.teacher, self.weight = teacher, weight

    method: Method
    auto: AutoWeight | None

    @property
    def requires(self) -> frozenset[Signal]:
        """What it asks of its teacher."""
        return FEATURES | (HEAD & self.method.requires)

    @property
    def needs_labels(self) -> bool:
        return "labels" in self.method.requires

    @property
    def factor(self) -> Tensor | float:
        """Of ``weight: auto``, as measured last; else 1."""
        return 1.0 if self.auto is None else self.auto.factor


@dataclass(frozen=True, slots=True)
class _Seen:
    """Some images, and what the student has made of them."""

    batch: Batch
    pyramid: Pyramid
    outputs: HeadOutputs | None


class Trainable(nn.Module):
    """A student and the terms of its loss: what optimizer, average, checkpoint and DistributedDataParallel see.

    Teachers are no part of it: they come to :meth:`forward` by what they said. Terms of weight 0 are not built.

    Args:
        student: trained in place; it is also what is exported.
        seed: of the methods' randomness.

    Raises:
        UserError: the student has no losses, or nothing in it learns.
    """

    def __init__(self, student: Model, *, seed: int = 0) -> None:
        super().__init__()
        self.student, self.seed = student, seed
        self.terms = nn.ModuleDict()
        self.step, self.total_steps, self.micro_batch = 0, None, 0
        if not student.can_learn:
            raise UserError("the student has no losses: give wrap(..., losses=...)")
        _require_learnable(student)

    student: Model
    step: int
    total_steps: int | None
    micro_batch: int

    # --- terms -----------------------------------------------------------------------------------------

    def learn_from(self, teacher: Teacher, methods: MethodLike | Sequence[MethodLike]) -> Matching:
        """Add a term for each method.

        Args:
            teacher: which the terms compare with.
            methods: names (``"ima"``), ``{name: {weight: …, option: …}}`` as in a recipe, or Method objects.

        Returns:
            Which levels of the two meet.

        Raises:
            UserError: the two cannot be compared, or not by one of the methods.
        """
        student, model = self.student, teacher.model
        require_apart(student, model)
        _require_learnable(student)  # a teacher that shares parameters with it has frozen them
        scale = input_scale(student.preprocessor, model.preprocessor)
        matching = match_levels(student.pyramid_channels, model.pyramid_channels, scale)
        context = PairContext(student, model, matching)
        for item in [methods] if isinstance(methods, str | Mapping | MethodConfig | Method) else methods:
            self._add(item, teacher, context)
        self._warn_of_missing_classes(teacher.name, context)
        return matching

    def _add(self, item: MethodLike, teacher: Teacher, context: PairContext) -> None:
        if isinstance(item, Method):
            config, method = MethodConfig.model_construct(name=type(item).__name__.lower()), item
        else:
            config = method_config(item)
            method = build_method(config.name, context, config.options)
        name = config.name
        term = Term(method, teacher.name, *build_weight(config, self.student.kind))
        if term.requires & HEAD:
            require_readable(self.student, teacher.model, name)
        if missing := sorted(term.requires - teacher.provides):
            raise UserError(
                f"{name} compares {' and '.join(missing)}, and {teacher.name} provides "
                f"{' and '.join(sorted(teacher.provides))} only: use a method on features, as ima or mimic"
            )
        if name in self.terms and self._term(name).teacher != teacher.name:
            name = f"{name}@{teacher.name}"
        if name in self.terms:
            raise UserError(f"method {config.name!r} is given twice")
        if term.weight.value > 0:
            self.terms[name] = term

    def _warn_of_missing_classes(self, teacher: str, context: PairContext) -> None:
        names = [
            name
            for name, term in self.terms.items()
            if self._term(name).teacher == teacher
            and any(isinstance(part, SharedClasses) for part in term.modules())
        ]
        if names and context.classes.missing:
            logger.warning(
                "the %s does not know %s: %s cannot teach the student these classes",
                teacher,
                ", ".join(context.classes.missing),
                ", ".join(names),
            )

    def without_labels(self) -> list[str]:
        """The terms for which images without labels can be used.

        Raises:
            UserError: there are terms, and all of them need labels.
        """
        able = self._label_free(self.terms)
        if self.terms and not able:
            raise UserError(
                f"{', '.join(self.terms)}: needs labels, and data.unlabeled has none: use ima, mimic, pkd "
                "or another method on features, or leave data.unlabeled out"
            )
        return able

    # --- a step ----------------------------------------------------------------------------------------

    def at_step(self, step: int, total_steps: int) -> None:
        """Say where in the run the next forward is: sets the terms' weights and seeds their randomness.

        Further forwards before the next call are the step's other micro-batches: they draw anew. A loop that
        never calls this gets full weights, and each training forward is a step.
        """
        self.step, self.total_steps, self.micro_batch = step, total_steps, 0

    def current_weights(self) -> dict[str, float]:
        """Each term's scheduled weight at this step; during a warm-up already above 0 at the first.

        Without the factors of ``weight: auto``.
        """
        progress = self._progress()
        weights = {name: self._term(name).weight for name in self.terms}
        return {name: w.value if progress is None else w.at(progress) for name, w in weights.items()}

    def applied_weights(self) -> dict[str, float]:
        """Each term's whole weight at this step, to log; waits for the device."""
        return {
            name: weight * float(self._term(name).factor) for name, weight in self.current_weights().items()
        }

    def requires(self, *, labeled: bool = True) -> dict[str, frozenset[Signal]]:
        """What this step asks of each teacher, by its name; of images without labels less than of others."""
        asked: dict[str, frozenset[Signal]] = {}
        for name in self._active(labeled):
            term = self._term(name)
            asked[term.teacher] = asked.get(term.teacher, frozenset()) | term.requires
        return asked

    def forward(
        self,
        samples: Samples,
        views: Views,
        unlabeled: Samples | None = None,
        unlabeled_views: Views | None = None,
    ) -> dict[str, Tensor]:
        """Every loss term by name, weighted: sum them.

        Args:
            samples: images with targets.
            views: what the teachers say of them, by the teachers' names.
            unlabeled: images without targets, for those terms that need no labels. Each of these terms is
                then the mean over all images that it has seen.
            unlabeled_views: what the teachers say of those.

        Raises:
            UserError: in training, no loss of the student's own has a gradient.
        """
        active = self._active()
        seen = self._look_at(samples, self._required(active), labeled=True)
        assert seen.outputs is not None
        losses = self.student.losses(seen.outputs, seen.batch)
        if self.training and torch.is_grad_enabled():
            _require_gradient(losses)
        if not active:
            return losses

        generator = self._generator(seen.batch.images_N3HW.device)
        terms = self._compare(active, seen, views, generator)
        self._measure(losses, terms, seen.pyramid)
        free = self._active(labeled=False)
        if unlabeled is not None and free:
            assert unlabeled_views is not None, "teachers look at all images"
            more = self._compare(
                free, self._look_at(unlabeled, self._required(free), labeled=False), unlabeled_views, generator
            )
            share = len(unlabeled) / (len(samples) + len(unlabeled))
            terms |= {name: torch.lerp(terms[name], more[name], share) for name in free}
        for name, weight in self.current_weights().items():
            if name not in terms:
                continue
            if name in losses:
                raise UserError(
                    f"the student's losses have a term {name!r}, as a method is called: name it otherwise in "
                    "wrap(..., losses=...)"
                )
            losses[name] = weight * self._term(name).factor * terms[name]
        if self.training and self.total_steps is None:
            self.step += 1
        elif self.training:
            self.micro_batch += 1
        return losses

    def _active(self, labeled: bool = True) -> list[str]:
        names = [name for name, weight in self.current_weights().items() if weight > 0]
        return names if labeled else self._label_free(names)

    def _label_free(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if not self._term(name).needs_labels]

    def _required(self, names: Iterable[str]) -> set[Requirement]:
        return {need for name in names for need in self._term(name).method.requires}

    def _look_at(self, samples: Samples, requires: set[Requirement], *, labeled: bool) -> _Seen:
        """What the student makes of images; without labels its head runs only where it is asked for."""
        batch = samples.batch(self.student)
        pyramid = self.student.forward_features(batch)
        if not labeled and not requires:
            return _Seen(batch, pyramid, None)
        signals = HEAD & requires
        return _Seen(batch, pyramid, head_outputs(self.student, pyramid, batch, signals))

    def _compare(
        self, names: list[str], seen: _Seen, views: Views, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The unweighted terms, by name."""
        of_teacher: dict[str, StepOutputs] = {}
        found = {}
        for name in names:
            term = self._term(name)
            if term.teacher not in of_teacher:
                view = views[term.teacher]
                of_teacher[term.teacher] = StepOutputs(
                    student=seen.pyramid,
                    teacher=view.features,
                    student_batch=seen.batch,
                    teacher_batch=view.batch,
                    alignment=Alignment(seen.batch, view.batch),
                    student_outputs=seen.outputs,
                    teacher_outputs=view.outputs,
                    student_model=self.student,
                    teacher_model=view.model,
                    generator=generator,
                    progress=self._progress(),
                )
            found[name] = term.method(of_teacher[term.teacher])
        return found

    def _term(self, name: str) -> Term:
        term = self.terms[name]
        assert isinstance(term, Term)
        return term

    def _progress(self) -> float | None:
        return None if self.total_steps is None else (self.step + 1) / (self.total_steps + 1)

    def _measure(self, losses: Mapping[str, Tensor], terms: Mapping[str, Tensor], pyramid: Pyramid) -> None:
        """Now and then, update automatic loss weights from gradient norms."""
        auto = {name: self._term(name).auto for name in terms}
        due = self.step % AUTO_EVERY == 0 and self.micro_batch == 0
        if not any(auto.values()) or not due or not (self.training and torch.is_grad_enabled()):
            return
        task = gradient_norm(torch.stack(list(losses.values())).sum(), pyramid)
        for name, weight in auto.items():
            if weight is not None:
                weight.update(task, gradient_norm(terms[name], pyramid))

    def _generator(self, device: torch.device) -> torch.Generator:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        generator = torch.Generator(device)
        return generator.manual_seed(mix_seed(self.seed, rank, self.step, self.micro_batch))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As any module's; also of a state that version 0.1 wrote."""
        return super().load_state_dict({_todays_key(key): x for key, x in state_dict.items()}, *args, **kwargs)


class Distiller:
    """Teachers, and the students that learn from them. A teacher looks at an image once for all of them.

    Args:
        teachers: each with a name of its own.
        trainables: the students with their terms.

    Raises:
        ValueError: two teachers have one name.
    """

    def __init__(self, teachers: Sequence[Teacher], trainables: Sequence[Trainable]) -> None:
        self.teachers = {teacher.name: teacher for teacher in teachers}
        if len(self.teachers) < len(teachers):
            raise ValueError(
                "two teachers have the same name: give each one of its own, as LiveTeacher(model, name)"
            )
        self.trainables = tuple(trainables)

    def to_channels_last(self) -> None:
        """Put the weights of all models in the memory format that convolutions on GPUs like."""
        for module in (*self.trainables, *(teacher.model for teacher in self.teachers.values())):
            module.to(memory_format=torch.channels_last)

    def observe(self, samples: Samples) -> dict[str, TeacherView]:
        """What the teachers say of these images, as far as a term of this step needs it; by name."""
        asked: dict[str, frozenset[Signal]] = {}
        for trainable in self.trainables:
            required = trainable.requires(labeled=samples.targets is not None)
            if not required:
                continue
            asked |= {name: asked.get(name, frozenset()) | signals for name, signals in required.items()}
            samples.batch(trainable.student)  # with its targets, for teachers of equal preprocessing
        return {name: self.teachers[name].observe(samples, signals) for name, signals in asked.items()}


def distiller_of(
    student: Model, teacher: Model | None = None, methods: Sequence[MethodLike] = (), *, seed: int = 0
) -> Distiller:
    """One student and one live teacher, or none where there are no methods."""
    trainable = Trainable(student, seed=seed)
    if teacher is None or not methods:
        return Distiller([], [trainable])
    require_apart(student, teacher)
    live = LiveTeacher(teacher)
    trainable.learn_from(live, methods)
    return Distiller([live], [trainable])


def require_apart(student: Model, teacher: Model) -> None:
    """Raises:
    UserError: the two are for different tasks, or are one module.
    """
    if student.task != teacher.task:
        raise UserError(
            f"the teacher is for {teacher.task} and the student for {student.task}: give both the same task"
        )
    if teacher.exported is student.exported:
        raise UserError("teacher and student are one module: give the teacher a copy (copy.deepcopy)")


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


def _todays_key(key: str) -> str:
    """``methods.ima.align…`` and ``auto.ima.log_factor`` of version 0.1 are parts of the term ``ima``."""
    room, _, rest = key.partition(".")
    name, _, rest = rest.partition(".")
    return {"methods": f"terms.{name}.method.{rest}", "auto": f"terms.{name}.auto.{rest}"}.get(room, key)
