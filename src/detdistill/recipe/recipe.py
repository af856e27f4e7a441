"""What a recipe may say: one YAML file is one experiment.

Unknown keys are refused with the nearest known one; every error of a file is reported at once, with its line.
Nothing here imports torch, so that a wrong recipe is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from detdistill.errors import UserError
from detdistill.recipe.methods import MethodConfig
from detdistill.recipe.models import AnyModel, ObjectConfig
from detdistill.recipe.reading import describe, expand_short_forms, read_recipe_file
from detdistill.recipe.sections import (
    DataConfig,
    Section,
    TrainingConfig,
)
from detdistill.text import require_folder_name


class Recipe(Section):
    """One experiment: data, a student, perhaps a teacher and methods, and a budget."""

    name: str = Field("run", description="the run folder is `runs/NAME`; `--out` overrides it")
    data: DataConfig = Field(description="`FOLDER`, `digits`, or the section below")
    student: AnyModel = Field(description="the detector that learns")
    teacher: AnyModel | None = Field(
        None,
        description="a run folder or weights file, or a section like the student's; default: no distillation",
    )
    inherit: bool = Field(False, description="the student starts from the teacher's neck and head")
    methods: tuple[MethodConfig, ...] = Field(
        (), description="`[ima]`, `[{ima: {weight: 1, alpha: 5}}]`, or sections as below"
    )
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig(), description="see below")

    @field_validator("name")
    @classmethod
    def _folder_below_runs(cls, value: str) -> str:
        return require_folder_name(value, "the name")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        return expand_short_forms(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _methods_need_teacher(self) -> Recipe:
        names = [method.name for method in self.methods]
        if self.teacher is None and (names or self.inherit):
            what = f"methods {names} need" if names else "inherit: true needs"
            raise ValueError(f"{what} a teacher: add `teacher: RUN_FOLDER_OR_WEIGHTS`")
        if self.inherit and self.student.weights is not None:
            raise ValueError("inherit overwrites neck and head of student.weights: leave one of the two out")
        if self.teacher is not None and not (names or self.inherit):
            raise ValueError("a teacher without methods teaches nothing: add `methods: [ima]`")
        if (
            self.teacher is not None
            and self.teacher.weights is None
            and not isinstance(self.teacher, ObjectConfig)
        ):
            raise ValueError("teacher.weights is missing: an untrained teacher teaches noise")
        if self.training.unlabeled_batch is not None and self.data.unlabeled is None:
            raise ValueError("training.unlabeled_batch has no images: add `data.unlabeled: FOLDER`")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"method {twice[0]!r} is listed twice: give each method once")
        return self


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file.

    ``base: other.yaml`` (relative to the file) is read first and this file overrides it; ``${NAME:-default}``
    takes an environment variable; ``overrides`` are ``key.sub=value`` with the value in YAML.

    Raises:
        UserError: with every error of the recipe, one a line, each with file and line.
    """
    tree, lines = read_recipe_file(Path(path), overrides)
    return parse_recipe(tree, source=str(path), lines=lines)


def parse_recipe(
    tree: Mapping[str, Any], source: str = "recipe", lines: Mapping[tuple[str, ...], str] | None = None
) -> Recipe:
    """Validate a recipe given as nested dictionaries; errors as in :func:`load_recipe`."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        found = [describe(item, Recipe, lines or {}, source) for item in error.errors()]
        if len(found) == 1:
            raise UserError(found[0]) from None
        head = f"Found {len(found)} error{'s' * (len(found) > 1)} in {source}"
        raise UserError("\n  ".join([head, *found])) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default spelled out, as YAML; but what a weights file decides stays unsaid."""
    tree = recipe.model_dump(mode="json")
    for section in ("student", "teacher"):
        model = getattr(recipe, section)
        if model is not None and model.weights is not None:
            tree[section] = {key: value for key, value in tree[section].items() if key in model.given}
    return yaml.safe_dump(tree, sort_keys=False)
