"""The sections of a recipe: data and training; and how a section refuses a key.

Those of models are in :mod:`detdistill.recipe.models`, of methods in :mod:`detdistill.recipe.methods`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from detdistill.errors import nearest
from detdistill.text import is_text

# Beyond these a number is a slip: they are above what any machine serves.
LONGEST_SIDE, MOST_IMAGES, MOST_EPOCHS, MOST_STEPS = 2**15, 10**7, 10**6, 10**9
COARSEST_STRIDE, MOST_DETECTIONS = 1024, 10**5


def with_home(value: str | None) -> str | None:
    """A path, ``~`` being the home folder."""
    return str(Path(value).expanduser()) if value is not None and value.startswith("~") else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, ser_json_inf_nan="constants")


Fault = tuple[tuple[str | int, ...], str | PydanticCustomError, Any, dict[str, Any]]
"""Place, kind, input and context of an error."""


def refuse_unknown_keys(section: type[BaseModel], value: Mapping[str, Any], of: str) -> None:
    """Nothing where the section has all of the keys.

    Args:
        of: how messages call the section.

    Raises:
        ValidationError: each unknown key with the nearest known one, and what else is wrong.
    """
    unknown = [key for key in value if key not in section.model_fields]
    if not unknown:
        return
    found = [unknown_key(key, f" of {of}", value[key], section.model_fields) for key in unknown]
    others = fault(section, {key: item for key, item in value.items() if key not in unknown})
    if others is not None:
        found += [(e["loc"], e["type"], e["input"], e.get("ctx", {})) for e in others.errors()]
    raise errors(found)


def unknown_key(key: str, of: str, value: Any, known: Iterable[str]) -> Fault:
    message = f"{of}; {nearest(str(key), known)}"
    return (key,), PydanticCustomError("unknown_key", "{message}", {"message": message}), value, {}


def fault(section: type[BaseModel], value: Mapping[str, Any]) -> ValidationError | None:
    try:
        section.model_validate(value)
    except ValidationError as error:
        return error
    return None


def errors(found: Iterable[Fault]) -> ValidationError:
    details: list[InitErrorDetails] = [
        {"type": kind, "loc": at, "input": value, "ctx": context} for at, kind, value, context in found
    ]
    return ValidationError.from_exception_data("section", details)


class DataConfig(Section):
    """Where the images and labels are. ``data: FOLDER`` alone is enough where the folder tells the rest."""

    root: Path | None = Field(None, description="the dataset's folder; not needed for `digits`")
    format: Literal["auto", "coco", "voc", "yolo", "digits", "label_maps", "cityscapes", "voc_segmentation"] = (
        Field("auto", description="auto: detected from the folder; the last three are segmentation")
    )
    train: str | None = Field(
        None,
        description="COCO: json file; VOC: image set or folder; YOLO: folder or list; label maps: the part",
    )
    val: str | None = Field(
        None, description="as `train`, for evaluation; or `20%`: as much of train, held out"
    )
    images: str | None = Field(None, description="COCO: image folder, if it is not next to the json")
    classes: tuple[str, ...] | None = Field(None, description="keep these classes, in this order")
    limit: int | None = Field(
        None, gt=0, description="train on this many training images only, evenly spread over the file"
    )
    unlabeled: str | None = Field(
        None, description="unlabeled images for distillation: a folder, a list, or a COCO json"
    )
    train_size: int = Field(
        600, gt=0, le=MOST_IMAGES, description="digits only: images to generate for training"
    )
    val_size: int = Field(
        200, gt=0, le=MOST_IMAGES, description="digits only: images to generate for evaluation"
    )
    image_size: int = Field(128, ge=64, le=LONGEST_SIDE, description="digits only: side in pixels")

    @field_validator("root")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return value.expanduser() if value else value

    _expand = field_validator("train", "val", "images", "unlabeled")(with_home)

    @field_validator("classes")
    @classmethod
    def _each_once(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError(f"name at least one class, and each once; got {list(value)}")
        if value is not None and not all(name.strip() and is_text(name) for name in value):
            raise ValueError(f"a name is empty or has half a character: correct it; got {list(value)}")
        return value

    @model_validator(mode="after")
    def _root_is_given(self) -> DataConfig:
        if self.format != "digits" and self.root is None:
            raise ValueError("data needs `root: FOLDER` (or `format: digits` for the built-in set)")
        return self


class AugmentConfig(Section):
    """Training augmentation. Each image's draw depends on (seed, epoch, image) alone."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    vertical_flip: float = Field(0.0, ge=0, le=1, description="probability of a vertical flip")
    photometric: bool = Field(
        False,
        description="random brightness, contrast, saturation, hue and channel order",
    )
    crop: float = Field(0.0, ge=0, le=1, description="probability of a random crop that keeps boxes (IoU crop)")
    zoom_out: float = Field(0.0, ge=0, le=1, description="probability of pasting on a larger canvas")
    scale: tuple[float, float] | None = Field(
        None, description="each image is resized by a factor between these, as [0.5, 2]"
    )
    crop_size: tuple[int, int] | None = Field(
        None, description="(height, width) of a random crop after that; smaller images are padded"
    )
    multi_scale: tuple[float, float] | None = Field(
        None,
        description="factors on the model's input size, drawn once per batch for teacher and student",
    )

    @field_validator("crop_size")
    @classmethod
    def _at_least_one_pixel(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= min(value) <= max(value) <= LONGEST_SIDE:
            raise ValueError(
                f"give height and width in pixels, at most {LONGEST_SIDE}, as [512, 1024]; got {list(value)}"
            )
        return value

    @field_validator("multi_scale", "scale")
    @classmethod
    def _low_high(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0.01 <= value[0] <= value[1] <= 100:
            raise ValueError(
                f"give (smallest, largest) factor from 0.01 to 100, as [0.8, 1.2]; got {list(value)}"
            )
        return value


class OptimizerConfig(Section):
    name: Literal["sgd", "adamw"] = Field("sgd", description="which optimizer")
    lr: float = Field(
        0.01, gt=0, le=1000, description="learning rate after the warm-up; AdamW's default is 1e-4"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD only")
    nesterov: bool = Field(False, description="SGD only")
    weight_decay: float = Field(1e-4, ge=0, le=1000, description="not applied to norms and biases")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW only"
    )
    backbone_lr_factor: float = Field(
        1.0, ge=0, le=1000, description="learning rate of the backbone over that of the rest"
    )

    @model_validator(mode="before")
    @classmethod
    def _rate_of_the_optimizer(cls, section: Any) -> Any:
        if isinstance(section, dict) and section.get("name") == "adamw" and "lr" not in section:
            return {**section, "lr": 1e-4}
        return section

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerConfig:
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0: give momentum, or leave nesterov out")
        return self


class ScheduleConfig(Section):
    name: Literal["step", "cosine", "poly", "constant"] = Field(
        "step", description="how the learning rate falls"
    )
    milestones: tuple[float, ...] = Field(
        (16 / 24, 22 / 24),
        description="step: fractions of the run at which the rate falls (2x: 16 and 22 of 24)",
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor at each milestone")
    power: float = Field(0.9, gt=0, description="poly: (1 - progress) to this power")
    warmup: int = Field(
        500, ge=0, le=MOST_STEPS, description="steps of linear warm-up (at most a tenth of the run)"
    )
    warmup_factor: float = Field(0.001, ge=0, le=1, description="the first rate over the learning rate")
    final_factor: float = Field(0.0, ge=0, le=1, description="cosine, poly: the last rate over the first")

    @field_validator("milestones")
    @classmethod
    def _fractions_rise(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < a < 1 for a in value) or any(b <= a for a, b in pairwise(value)):
            raise ValueError(f"milestones are rising fractions of the run, as [0.67, 0.92]; got {list(value)}")
        return value


class TrainingConfig(Section):
    """The budget and how it is spent; equal for everything that is compared."""

    epochs: float = Field(24, gt=0, le=MOST_EPOCHS, description="passes over the training images")
    max_steps: int | None = Field(
        None, gt=0, le=MOST_STEPS, description="number of optimizer steps; replaces `epochs` as the budget"
    )
    max_time: float | None = Field(None, gt=0, description="save and stop after this many minutes")
    batch_size: int = Field(
        16, gt=0, le=MOST_IMAGES, description="images per optimizer step, over all processes"
    )
    accumulate: int = Field(1, gt=0, le=MOST_IMAGES, description="forward passes per step")
    unlabeled_batch: int | None = Field(
        None,
        gt=0,
        le=MOST_IMAGES,
        description="images of `data.unlabeled` per step, in addition; default: as many as `batch_size`",
    )
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(), description="see below")
    schedule: ScheduleConfig = Field(default_factory=lambda: ScheduleConfig(), description="see below")
    augment: AugmentConfig = Field(default_factory=lambda: AugmentConfig(), description="see below")
    clip_norm: float | None = Field(35.0, gt=0, description="largest norm of the whole gradient")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32", description="bf16 and fp16 run under autocast; auto: bf16 if the device supports it"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the averaged weights, which are then exported"
    )
    channels_last: bool = Field(False, description="memory format that suits tensor cores")
    sync_batchnorm: bool = Field(False, description="BatchNorm statistics over all processes")
    workers: int = Field(2, ge=0, le=1024, description="loader processes")
    seed: int = Field(0, ge=0, lt=2**32, description="of weights, order, augmentation and methods")
    evaluate_every: float = Field(
        1, ge=0, le=MOST_EPOCHS, description="epochs between evaluations; 0: only at the end"
    )
    checkpoint_every: int = Field(
        500, gt=0, le=MOST_STEPS, description="steps between checkpoints; also at each epoch's end"
    )
    patience: int | None = Field(
        None,
        gt=0,
        le=MOST_STEPS,
        description="stop after this many evaluations without improvement, and export the best weights",
    )
    trackers: tuple[str, ...] | None = Field(
        None, description="experiment trackers, as `[wandb]`; default: TensorBoard if it is installed"
    )
    callbacks: tuple[str, ...] = Field((), description="callbacks of installed packages, by name")
    pictures: bool = Field(True, description="draw curves.png and samples.png")
    device: Literal["auto", "cpu"] = Field("auto", description="auto: an accelerator if there is one")

    @model_validator(mode="after")
    def _steps_divide(self) -> TrainingConfig:
        for name, size in (("batch_size", self.batch_size), ("unlabeled_batch", self.unlabeled_batch)):
            if size is not None and size % self.accumulate:
                raise ValueError(f"{name} must be a multiple of accumulate; got {size} and {self.accumulate}")
        return self

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> TrainingConfig:
        if self.patience is not None and self.evaluate_every == 0:
            raise ValueError(
                "patience counts evaluations, and evaluate_every: 0 has none before the end: raise "
                "evaluate_every, or leave patience out"
            )
        return self
