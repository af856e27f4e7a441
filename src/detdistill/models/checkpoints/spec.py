"""What a saved model's file says of the model: read as JSON from a stranger, so checked before it is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from detdistill.errors import UserError
from detdistill.recipe import ModelConfig, ObjectConfig
from detdistill.recipe.models import AnyModel, SavedModelConfig
from detdistill.text import is_text, printable

MOST_CHARACTERS = 50_000_000
"""Of a spec; one with 20,000 classes has less than a million."""


def _unique_names(classes: tuple[str, ...]) -> tuple[str, ...]:
    if any(not name.strip() for name in classes):
        raise ValueError("a class has an empty name")
    if not all(map(is_text, classes)):
        raise ValueError("a class has half a character in its name")
    if len(set(classes)) < len(classes):
        twice = next(name for i, name in enumerate(classes) if name in classes[:i])
        raise ValueError(f"the class {printable(twice)!r} is named twice")
    return classes


ClassNames = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_unique_names)]
"""At least one class, each named once."""

_CLASS_NAMES: TypeAdapter[tuple[str, ...]] = TypeAdapter(ClassNames)


def require_class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """The names, as a saved file could have them.

    Raises:
        UserError: there is none, one is no text or empty, or two are equal.
    """
    try:
        return _CLASS_NAMES.validate_python(tuple(classes), strict=True)
    except ValidationError as error:
        raise UserError(f"classes: {first_fault(error)}; give a list of names, as ['cat', 'dog']") from None


CategoryIds = tuple[StrictInt, ...]
"""Of the data's classes, by label."""


def require_id_for_each(classes: Sequence[str], ids: Sequence[int] | None) -> None:
    """Refuse category ids that are not one for each class.

    Raises:
        ValueError: there are more or fewer, or two are equal.
    """
    if ids is not None and not len(set(ids)) == len(ids) == len(classes):
        raise ValueError("category_ids is not one id for each class")


_Mean = Annotated[float, Field(ge=-1e3, le=1e3)]
_Std = Annotated[float, Field(gt=1e-6, le=1e6)]


class Spec(BaseModel):
    """The schema of ``Model.spec``.

    Attributes:
        detdistill: version that wrote the file.
        model: the recipe section that builds the model.
        classes: label i means ``classes[i]``.
        category_ids: the ids of these classes in the annotations that it was trained with.
        mean, std: of RGB in [0, 1], the input normalization.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    detdistill: str | None = None
    model: AnyModel
    classes: ClassNames
    category_ids: CategoryIds | None = None
    mean: tuple[_Mean, _Mean, _Mean]
    std: tuple[_Std, _Std, _Std]

    @model_validator(mode="before")
    @classmethod
    def _of_version_0_1(cls, tree: Any) -> Any:
        """There the configuration of a transformers checkpoint stood next to the model's section."""
        if isinstance(tree, dict) and "transformers" in tree and isinstance(tree.get("model"), dict):
            rest = {key: value for key, value in tree.items() if key != "transformers"}
            return rest | {"model": {**tree["model"], "transformers": tree["transformers"]}}
        return tree

    @field_validator("model")
    @classmethod
    def _no_object(cls, value: ModelConfig) -> ModelConfig:
        if isinstance(value, ObjectConfig):
            raise ValueError("it was a Python object, which no file can build")
        if isinstance(value, SavedModelConfig):
            raise ValueError("it is not the section of a family, which alone can be built")
        return value

    @model_validator(mode="after")
    def _an_id_for_each_class(self) -> Spec:
        require_id_for_each(self.classes, self.category_ids)
        return self


def parse_spec(text: str, source: str) -> Spec:
    """The spec in a file's metadata.

    Args:
        text: JSON.
        source: how messages call the file.

    Raises:
        UserError: it is no JSON, or not a spec.
    """
    return require_spec(read_json(text, source), source)


def read_json(text: str, source: str) -> Any:
    """What a file says of its model, before it is checked.

    Raises:
        UserError: it is no JSON.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{source}: what it says of its model is {len(text):,} characters long; save it again")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise UserError(
            f"{source}: what it says of its model is not JSON ({reason}); save the model again"
        ) from None


def require_spec(tree: Any, source: str) -> Spec:
    """The spec, validated.

    Raises:
        UserError: it is not a spec; one line with the first fault.
    """
    try:
        return Spec.model_validate(tree)
    except ValidationError as error:
        raise UserError(
            f"{source}: what it says of its model cannot be used ({first_fault(error)}); "
            "save the model again with this version of detdistill"
        ) from None


def first_fault(error: ValidationError) -> str:
    """Where the first fault is, and what it is: ``model.channels: input should be greater than 0``."""
    found = error.errors(include_url=False, include_input=False)[0]
    at = ".".join(map(str, found["loc"]))
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] in ("model_type", "dict_type"):  # pydantic's words name the class
        message = "should be names and values, as {}"
    return printable(f"{at}: {message}" if at else message)[:200]
