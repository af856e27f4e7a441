"""``train`` and ``distill``: from a recipe, or from four words of Python, to a run folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from detdistill.errors import UserError
from detdistill.models.base import Model
from detdistill.models.checkpoints.io import describe
from detdistill.output import output_path
from detdistill.recipe import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    Recipe,
    TrainingConfig,
    load_recipe,
    parse_recipe,
)
from detdistill.text import printable
from detdistill.training import loop
from detdistill.training.callbacks import Callback
from detdistill.training.loop import TrainResult


def train(
    recipe: Recipe | str | Path,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train what a recipe describes.

    Args:
        recipe: a recipe, or its file.
        overrides: ``key.sub=value``, for a file.
        out: the run folder; ``runs/NAME`` by default.
        resume: go on where an earlier call stopped; else start anew.
        callbacks: what watches the run: :class:`detdistill.Callback` objects.

    Raises:
        UserError: something in the recipe, its data or its weights cannot be used.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    run = Path("runs") / recipe.name if out is None else output_path(out)
    return loop.train(recipe, run, resume=resume, callbacks=callbacks)


def distill(
    teacher: Model | ModelConfig | Mapping[str, Any] | str | Path,
    student: Model | ModelConfig | Mapping[str, Any],
    data: DataConfig | Mapping[str, Any] | str | Path,
    method: str | Mapping[str, Any] | MethodConfig | Sequence[str | Mapping[str, Any] | MethodConfig] = "ima",
    *,
    inherit: bool = False,
    training: TrainingConfig | Mapping[str, Any] | None = None,
    out: str | Path = "runs/distill",
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Teach a student with a teacher; every argument is a recipe's section of that name.

    Args:
        teacher: a run folder or weights file, a section with ``weights``, or a detector, which is frozen.
        student: a section, as ``{"family": "fcos", "backbone": "mobilenetv3_small_050"}``, or a detector, which
            is trained in place; :func:`detdistill.wrap` makes one of any module.
        data: the dataset's folder, ``"digits"``, or a section.
        method: one method or several, as in a recipe's ``methods``.
        inherit: the student starts from the teacher's neck and head.
        training: the budget; the default is the paper's 24 epochs of SGD.
        out: the run folder.
        resume: go on where an earlier call stopped; else start anew.
        callbacks: what watches the run: :class:`detdistill.Callback` objects.

    Raises:
        UserError: something in the arguments, the data or the weights cannot be used.

    Example:
        >>> distill("runs/teacher", {"family": "fcos", "backbone": "resnet18"}, "data/boards").metrics["AP"]
    """
    out = output_path(out)
    recipe = parse_recipe(
        {
            "name": printable(out.resolve().name) or "run",
            "data": data,
            "teacher": _section(teacher, frozen=True),
            "student": _section(student, frozen=False),
            "methods": method,
            "inherit": inherit,
            "training": training or {},
        },
        source="the arguments of distill",
    )
    return loop.train(
        recipe,
        out,
        resume=resume,
        student=student if isinstance(student, Model) else None,
        teacher=teacher if isinstance(teacher, Model) else None,
        callbacks=callbacks,
    )


def _section(model: Any, *, frozen: bool) -> Any:
    """A model's section; of an object what tells it from others, so that a run goes on with the same one."""
    if isinstance(model, nn.Module) and not isinstance(model, Model):
        raise UserError(f"a {type(model).__name__} is no detector yet: give detdistill.wrap(model, ...)")
    return {"python": describe(model, values=frozen)} if isinstance(model, Model) else model
