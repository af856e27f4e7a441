"""The two models of a run: built from its recipe, or given as objects."""

from __future__ import annotations

from collections.abc import Sequence

from detdistill.errors import UserError
from detdistill.models import build_model, load_teacher
from detdistill.models.base import Model
from detdistill.models.checkpoints.weights import require_usable_weights
from detdistill.recipe import Recipe


def models_of(
    recipe: Recipe, classes: Sequence[str], student: Model | None, teacher: Model | None
) -> tuple[Model, Model | None]:
    """Student and teacher.

    Args:
        recipe: its sections are built, where there is no object.
        classes: the data's class names.
        student, teacher: objects for the sections that say ``python``.

    Raises:
        UserError: a section cannot be built, the student object has other classes than the data, or weights
            are not finite or not of 32 bits.
    """
    if student is None:
        student = build_model(recipe.student, classes)
    elif student.classes != tuple(classes):
        raise UserError(
            f"the student's classes are {', '.join(student.classes):.60} and the data's "
            f"{', '.join(classes):.60}: give both the same, in one order"
        )
    if teacher is None and recipe.teacher is not None:
        teacher = load_teacher(recipe.teacher, classes)
    require_usable_weights(student, "the student", learns=True)
    if teacher is not None:
        require_usable_weights(teacher, "the teacher")
    if not student.can_predict:
        raise UserError("the student gives no detections, and cannot be evaluated: give wrap(..., decode=...)")
    return student, teacher
