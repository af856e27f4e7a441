"""What a recipe may say: one YAML file is one experiment.

Unknown keys are refused with the nearest known one; every error of a file is reported at once, with its line.
Nothing here imports torch, so that a wrong recipe is refused at once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class UserError(Exception):
    """Something that the user can mend; the message is one line that says what and how."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Where the images and labels are. ``data: FOLDER`` alone is enough where the folder tells the rest."""

    root: Path | None = Field(None, description="the dataset's folder; not needed for `digits`")
    format: Literal["auto", "coco", "voc", "yolo", "digits"] = Field(
        "auto", description="told by looking at the folder unless given"
    )
    train: str | None = Field(
        None, description="COCO: json file; VOC: image set; YOLO: images folder or list"
    )
    val: str | None = Field(None, description="as `train`, for evaluation")
    images: str | None = Field(None, description="COCO: image folder, where it is not beside the json")
    classes: tuple[str, ...] | None = Field(None, description="keep these classes, in this order")
    train_size: int = Field(600, gt=0, description="digits only: images to generate for training")
    val_size: int = Field(200, gt=0, description="digits only: images to generate for evaluation")
    image_size: int = Field(160, ge=64, description="digits only: side in pixels")

    @model_validator(mode="after")
    def _root_is_given(self) -> DataConfig:
        if self.format != "digits" and self.root is None:
            raise ValueError("data needs `root: FOLDER` (or `format: digits` for the built-in set)")
        return self


class AugmentConfig(_Section):
    """Training augmentation. Each image's draw depends on (seed, epoch, image) alone."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    vertical_flip: float = Field(0.0, ge=0, le=1, description="probability of a vertical flip")
    photometric: bool = Field(False, description="brightness, contrast, saturation, hue")
    crop: float = Field(
        0.0, ge=0, le=1, description="probability of a random crop that keeps boxes (IoU crop)"
    )
    zoom_out: float = Field(0.0, ge=0, le=1, description="probability of pasting on a larger canvas")
    multi_scale: tuple[float, float] | None = Field(
        None,
        description="factors on the model's input size, drawn once a batch for teacher and student alike",
    )


class ModelConfig(_Section):
    """A detector: family, backbone, sizes, and where its weights come from."""

    family: Literal["retinanet", "fcos", "faster_rcnn"] = "retinanet"
    backbone: str = Field("resnet50", description="any timm model that gives feature maps")
    backbone_weights: str | None = Field(
        None, description="`imagenet` (timm downloads them), a file of timm's layout, or none"
    )
    weights: str | None = Field(
        None, description="the whole detector: a run folder, a .safetensors or .pt file, or `torchvision`"
    )
    channels: int = Field(256, gt=0, description="width of pyramid and head")
    head_depth: int | None = Field(
        None, ge=0, description="convolutions in each head tower; family's default"
    )
    strides: tuple[int, ...] | None = Field(None, description="pyramid levels; the family's own by default")
    anchor_scale: float | None = Field(
        None, gt=0, description="smallest anchor side over its stride; 4 (RetinaNet) or 8 (RPN) by default"
    )
    norm: Literal["batch", "frozen"] = Field(
        "batch", description="backbone normalisation; frozen for batches < 8"
    )
    freeze_stages: int = Field(
        0, ge=0, le=5, description="backbone stages, from the input, that do not learn"
    )
    size: tuple[int, int] | None = Field(
        None, description="(short, long) side of the input; none: as it comes"
    )
    score_threshold: float = Field(0.05, ge=0, le=1)
    nms_threshold: float = Field(0.5, gt=0, le=1)
    max_detections: int = Field(100, gt=0)

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("strides")
    @classmethod
    def _strides_double(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value and (value[0] not in (2, 4, 8, 16, 32) or any(b != 2 * a for a, b in pairwise(value))):
            raise ValueError(f"strides must double from level to level, as 8, 16, 32; got {list(value)}")
        return value


class OptimizerConfig(_Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD only")
    nesterov: bool = Field(False, description="SGD only")
    weight_decay: float = Field(1e-4, ge=0, description="not applied to norms and biases")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW only")
    backbone_lr_factor: float = Field(
        1.0, ge=0, description="learning rate of the backbone over that of the rest"
    )


class ScheduleConfig(_Section):
    name: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[float, ...] = Field(
        (16 / 24, 22 / 24),
        description="step: fractions of the run at which the rate falls (2x: 16 and 22 of 24)",
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor at each milestone")
    warmup: int = Field(500, ge=0, description="steps of linear warm-up (at most a tenth of the run)")
    warmup_factor: float = Field(0.001, ge=0, le=1)
    final_factor: float = Field(0.0, ge=0, le=1, description="cosine: the last rate over the first")


class TrainingConfig(_Section):
    """The budget and how it is spent; equal for everything that is compared."""

    epochs: float = Field(24, gt=0, description="passes over the training images")
    max_steps: int | None = Field(None, gt=0, description="stop after so many optimiser steps")
    max_time: float | None = Field(None, gt=0, description="stop, and save, after so many minutes")
    batch_size: int = Field(16, gt=0, description="images of one optimiser step, over all processes")
    accumulate: int = Field(1, gt=0, description="forward passes that make one step")
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig())
    schedule: ScheduleConfig = Field(default_factory=lambda: ScheduleConfig())
    augment: AugmentConfig = Field(default_factory=lambda: AugmentConfig())
    clip_norm: float | None = Field(35.0, gt=0, description="largest norm of the whole gradient")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of averaged weights; they are what is exported"
    )
    channels_last: bool = False
    sync_batchnorm: bool = False
    workers: int = Field(2, ge=0, description="processes that decode and augment")
    seed: int = 0
    evaluate_every: float = Field(1, ge=0, description="epochs between evaluations; 0: only at the end")
    checkpoint_every: int = Field(
        500, gt=0, description="steps between checkpoints; also at each epoch's end"
    )
    patience: int | None = Field(None, gt=0, description="stop after so many evaluations without a better AP")
    device: Literal["auto", "cpu"] = "auto"


class MethodConfig(_Section):
    """One distillation method: its name, its weight over time, and the options of its own loss."""

    name: str
    weight: float = Field(1.0, ge=0, description="outer weight; 0 trains the plain student, bit for bit")
    warmup: float = Field(
        0.0, ge=0, lt=1, description="fraction of the run over which the weight rises from 0"
    )
    decay_from: float | None = Field(
        None, ge=0, lt=1, description="fraction of the run from which the weight falls to 0 at the end"
    )
    options: dict[str, Any] = Field(default_factory=dict)


class Recipe(_Section):
    """One experiment: data, a student, perhaps a teacher and methods, and a budget."""

    name: str = "run"
    data: DataConfig
    student: ModelConfig
    teacher: ModelConfig | None = None
    methods: tuple[MethodConfig, ...] = ()
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig())

    @field_validator("data", mode="before")
    @classmethod
    def _data_short(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return {"format": "digits"} if str(value) == "digits" else {"root": value}
        return value

    @field_validator("teacher", mode="before")
    @classmethod
    def _teacher_short(cls, value: Any) -> Any:
        return {"weights": str(value)} if isinstance(value, str | Path) else value

    @field_validator("methods", mode="before")
    @classmethod
    def _methods_short(cls, value: Any) -> Any:
        return [
            _expand_method(item) for item in ([value] if isinstance(value, str | Mapping) else value or ())
        ]

    @model_validator(mode="after")
    def _methods_need_teacher(self) -> Recipe:
        names = [method.name for method in self.methods]
        if names and self.teacher is None:
            raise ValueError(f"methods {names} need a teacher: add `teacher: RUN_FOLDER_OR_WEIGHTS`")
        if self.teacher is not None and not names:
            raise ValueError("a teacher without methods teaches nothing: add `methods: [ima]`")
        if self.teacher is not None and self.teacher.weights is None:
            raise ValueError("teacher.weights is missing: an untrained teacher teaches noise")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"method {twice[0]!r} is listed twice: give each method once")
        return self


def _expand_method(item: Any) -> Any:
    """``ima`` or ``{ima: {weight: 1, alpha: 5}}`` to the full form."""
    if isinstance(item, str):
        return {"name": item}
    if isinstance(item, Mapping) and len(item) == 1 and "name" not in item:
        ((name, options),) = item.items()
        options = dict(options or {})
        own = {key: options.pop(key) for key in ("weight", "warmup", "decay_from") if key in options}
        return {"name": name, **own, "options": options}
    return item


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file.

    ``base: other.yaml`` (relative to the file) is read first and this file laid over it; ``${NAME:-default}``
    takes an environment variable; ``overrides`` are ``key.sub=value`` with the value in YAML.

    Raises:
        UserError: with every error of the recipe, one a line, each with file and line.
    """
    path = Path(path)
    tree, lines = _read_layers(path, ())
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"{override!r} is no override: write key.sub=value, as training.epochs=12")
        _set(tree, key.split("."), yaml.safe_load(value), override)
    return parse_recipe(tree, source=str(path), lines=lines)


def parse_recipe(
    tree: Mapping[str, Any], source: str = "recipe", lines: Mapping[tuple[str, ...], str] | None = None
) -> Recipe:
    """Validate a recipe given as nested dictionaries; errors as in :func:`load_recipe`."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        found = [_describe(item, lines or {}, source) for item in error.errors()]
        head = f"Found {len(found)} error{'s' * (len(found) > 1)} in {source}"
        raise UserError("\n  ".join([head, *found])) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default spelled out, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where one of the known words is near, else what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


# --- reading YAML with its lines -------------------------------------------------------------------------


def _read_layers(path: Path, above: Sequence[Path]) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    if path.resolve() in above:
        raise UserError(f"{path}: `base` goes in a circle")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    text = _expand_environment(text, path)
    try:
        tree = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{path}: a recipe is a mapping with keys such as data, student, training")
    lines: dict[tuple[str, ...], str] = {}
    _collect_lines(root, (), path, lines)
    base = tree.pop("base", None)
    if base is None:
        return tree, lines
    base_tree, base_lines = _read_layers(path.parent / str(base), (*above, path.resolve()))
    return _merge(base_tree, tree), {**base_lines, **lines}


def _expand_environment(text: str, path: Path) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if name not in os.environ and default is None:
            raise UserError(f"{path}: the environment variable {name} is not set")
        return os.environ.get(name, default or "")

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value, text)


def _collect_lines(
    node: yaml.Node | None, at: tuple[str, ...], path: Path, lines: dict[tuple[str, ...], str]
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            lines[here] = f"{path}:{key.start_mark.line + 1}"
            _collect_lines(value, here, path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*at, str(i))] = f"{path}:{value.start_mark.line + 1}"
            _collect_lines(value, (*at, str(i)), path, lines)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    node: Any = tree
    for key in keys[:-1]:
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
            continue
        if not isinstance(node, dict):
            raise UserError(f"{override!r}: nothing below {key!r} can be set; write it in the recipe file")
        if not isinstance(node.get(key), dict | list):
            node[key] = {}
        node = node[key]
    if isinstance(node, list) and keys[-1].isdigit() and int(keys[-1]) < len(node):
        node[int(keys[-1])] = value
    elif isinstance(node, dict):
        node[keys[-1]] = value
    else:
        raise UserError(
            f"{override!r}: {'.'.join(keys[:-1])!r} is not a mapping; write it in the recipe file"
        )


def _describe(error: Any, lines: Mapping[tuple[str, ...], str], source: str) -> str:
    at = tuple(str(part) for part in error["loc"])
    where = next((lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in lines), source)
    key = ".".join(at) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}; {nearest(at[-1], _known_keys(at[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f" (got {error['input']!r})"
    return f"{where}: {key}: {message[0].lower()}{message[1:]}{given}"


def _known_keys(at: Sequence[str]) -> Iterable[str]:
    section: type[BaseModel] = Recipe
    for part in at:
        if part.isdigit() or part not in section.model_fields:
            continue
        for candidate in _sections_in(section.model_fields[part].annotation):
            section = candidate
    return section.model_fields


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _sections_in(part)]
