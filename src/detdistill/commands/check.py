"""``check``: validate a recipe, its data and its models, and suggest a fix for each problem."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from detdistill.data.box_checks import small_objects
from detdistill.data.inspect import Inspection, inspect_data
from detdistill.data.records import Finding, Split
from detdistill.data.transforms import build_augment
from detdistill.distillation.classes import ClassMatch
from detdistill.distillation.distiller import distiller_of
from detdistill.distillation.inheriting import inherit
from detdistill.distillation.levels import Matching, describe_input
from detdistill.distillation.pair import Pair
from detdistill.errors import UserError
from detdistill.models import build_model, load_teacher
from detdistill.models.base import Detector, Model
from detdistill.models.build import check_targets
from detdistill.models.limits import require_memory_for_training
from detdistill.recipe import Recipe, TrainingConfig, load_recipe
from detdistill.training.callbacks import installed_callbacks, trackers_of
from detdistill.training.step import build_optimizer
from detdistill.training.trial import Trial, try_step

MUCH_LARGER = 4  # a factor on the input size that nobody uses


@dataclass(frozen=True)
class ModelSummary:
    """One model of a recipe.

    Attributes:
        role: "student" or "teacher".
        what: family and backbone.
        parameters: of the whole detector.
        learning: of those that the run would change.
        levels: ``{stride: channels}`` of its pyramid.
        input: the size of what it sees, in words.
    """

    role: str
    what: str
    parameters: int
    learning: int
    levels: dict[int, int]
    input: str


@dataclass
class Check:
    """What ``check`` found.

    Attributes:
        recipe: as it was read, defaults filled in.
        inspection: of the data; None where it could not be opened.
        models: the student and, if there is one, the teacher.
        notes: what loading weights had to say.
        matching: which levels of the pair meet; None without a teacher.
        classes: which classes the two share, by name; None without a teacher.
        step: a training step that was tried; None where it failed or was left out.
        problems: what would stop the run, in addition to the data's findings.
    """

    recipe: Recipe
    inspection: Inspection | None = None
    models: list[ModelSummary] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    matching: Matching | None = None
    classes: ClassMatch | None = None
    step: Trial | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the run would start."""
        return not self.problems and self.inspection is not None and not self.inspection.errors


def check(recipe: Recipe | str | Path, overrides: Iterable[str] = (), *, step: bool = True) -> Check:
    """Look a recipe over before it is run; nothing is written, and random states stay as they were.

    Args:
        recipe: a recipe, or its file.
        overrides: as ``training.epochs=12``; only for a file.
        step: try one training step, where nothing else is wrong; large models take their time for it.

    Raises:
        UserError: the recipe itself cannot be read. What is wrong with its data and models is in the result.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    result = Check(recipe)
    try:
        result.inspection = inspect_data(recipe.data)
    except UserError as error:
        result.problems.append(str(error))
        return result
    splits = result.inspection.splits
    result.problems += [
        f"{recipe.data.root}: no {name} split found; name it with data.{name}"
        + ", or hold out a part of train with data.val=20%" * (name == "val")
        for name in ("train", "val")
        if name not in splits
    ]
    if "train" in splits and splits["train"].classes:
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices):
            torch.manual_seed(recipe.training.seed)
            _check_models(result, splits["train"], step)
    return result


def _check_models(result: Check, train: Split, step: bool) -> None:
    recipe, classes = result.recipe, train.classes
    student = teacher = distiller = None
    with _messages() as notes:
        try:
            student = build_model(recipe.student, classes)
            check_targets(recipe.student, train)
        except UserError as error:
            result.problems.append(f"student: {error}")
        try:
            teacher = load_teacher(recipe.teacher, classes) if recipe.teacher is not None else None
        except UserError as error:
            result.problems.append(f"teacher: {error}")
    result.notes += notes
    if isinstance(student, Detector) and result.inspection is not None:
        result.inspection.findings.extend(_small_objects(student, train))
    if student is not None and teacher is not None:
        with _messages() as notes:
            try:
                pair = Pair(student, teacher)  # what meets is reported of methods that are refused, too
                result.matching, result.classes = pair.matching, pair.classes
                distiller = distiller_of(student, teacher, recipe.methods, seed=recipe.training.seed)
                (trainable,) = distiller.trainables
                if recipe.data.unlabeled is not None and (able := trainable.without_labels()):
                    result.notes.append(f"images without labels: {', '.join(able)} teaches from them")
                if recipe.inherit:
                    result.notes.append(inherit(student, teacher))
            except UserError as error:
                result.problems.append(f"pair: {error}")
        result.notes += notes
    with _messages() as notes:
        try:
            build_augment(recipe.training.augment, label_maps=train.has_label_maps)
        except UserError as error:
            result.problems.append(str(error))
        try:
            trackers_of(recipe.training.trackers)
            installed_callbacks(recipe.training.callbacks)
        except UserError as error:
            result.problems.append(str(error))
        try:
            require_memory_for_training(recipe, student, train)
            if student is not None:
                distiller = distiller or distiller_of(student)
                build_optimizer(distiller.trainables[0], recipe.training.optimizer)
        except UserError as error:
            result.problems.append(str(error))
    result.notes += notes
    result.notes += _budget_notes(recipe.training, len(train))
    if distiller is not None and step and result.ok:
        with _messages() as notes:
            try:
                result.step = try_step(recipe, distiller, train)
            except UserError as error:
                result.problems.append(f"training step: {error}")
            except Exception as error:  # of a backbone or a model that this project did not write
                reason = " ".join(str(error).split())[:200]
                result.problems.append(f"training step: {type(error).__name__}: {reason}")
        result.notes += notes
    elif step:
        result.notes.append("no training step was tried: fix the errors first")
    result.models += [
        _summary(role, model) for role, model in (("student", student), ("teacher", teacher)) if model
    ]


def _budget_notes(training: TrainingConfig, images: int) -> list[str]:
    """What can run, and is hardly meant."""
    notes, processors = [], os.cpu_count() or 1
    if training.workers > 4 * processors:
        notes.append(
            f"warning: training.workers is {training.workers} and this machine has {processors} processors: "
            f"give training.workers={processors}"
        )
    if training.batch_size > images:
        notes.append(
            f"warning: training.batch_size is {training.batch_size} for {images} training "
            f"image{'s' * (images > 1)}: each step repeats them"
        )
    if (factors := training.augment.multi_scale) is not None and factors[1] > MUCH_LARGER:
        notes.append(
            f"warning: training.augment.multi_scale makes inputs up to {factors[1]:g} times as large: it takes "
            "factors, as [0.8, 1.2], not pixels"
        )
    return notes


def _small_objects(student: Detector, train: Split) -> list[Finding]:
    preprocess = student.preprocessor

    def scale_of(height: int, width: int) -> tuple[float, float]:
        if preprocess.keep_ratio or preprocess.size is None:
            return (preprocess.scale(height, width),) * 2
        rows, columns = preprocess.stretched()
        return rows / height, columns / width

    return small_objects(train, scale_of, min(student.pyramid_channels), preprocess.size)


def _summary(role: str, model: Model) -> ModelSummary:
    learns = (p.numel() for p in model.parameters() if p.requires_grad)
    return ModelSummary(
        role=role,
        what=model.description,
        parameters=sum(p.numel() for p in model.parameters()),
        learning=sum(learns) if role == "student" else 0,
        levels=dict(model.pyramid_channels),
        input=describe_input(model.preprocessor),
    )


@contextmanager
def _messages() -> Iterator[list[str]]:
    """Collects what the models' loading logs, instead of printing it."""
    messages: list[str] = []
    logger = logging.getLogger("detdistill")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
