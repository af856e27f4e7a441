"""From a recipe's model section, or from a saved file, to a detector."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from detdistill.config import ModelConfig, UserError, names_of
from detdistill.data.records import Split
from detdistill.models import torchvision_weights
from detdistill.models.base import Batch, Model, eval_mode
from detdistill.models.cascade_rcnn import cascade_mask_rcnn, cascade_rcnn
from detdistill.models.detr_families import d_fine, rtdetr_v2
from detdistill.models.faster_rcnn import faster_rcnn
from detdistill.models.fcos import fcos
from detdistill.models.gfl import gfl
from detdistill.models.limits import require_memory_for_model
from detdistill.models.mask_rcnn import mask_rcnn
from detdistill.models.reppoints import reppoints
from detdistill.models.retinanet import retinanet
from detdistill.models.segmentation import deeplabv3, pspnet
from detdistill.models.weights import (
    PARTS,
    LoadReport,
    find_weights,
    load_backbone,
    load_weights,
    read_spec,
    read_state_dict,
)

logger = logging.getLogger(__name__)

FAMILIES: Mapping[str, Callable[..., Model]] = {
    "retinanet": retinanet,
    "fcos": fcos,
    "gfl": gfl,
    "reppoints": reppoints,
    "faster_rcnn": faster_rcnn,
    "mask_rcnn": mask_rcnn,
    "cascade_rcnn": cascade_rcnn,
    "cascade_mask_rcnn": cascade_mask_rcnn,
    "rtdetr_v2": rtdetr_v2,
    "d_fine": d_fine,
    "pspnet": pspnet,
    "deeplabv3": deeplabv3,
}
"""How a family's model is built: over a backbone, with keyword options of :class:`ModelConfig`'s names."""

ARCHITECTURE = (
    "family", "backbone", "channels", "head_depth", "strides", "anchor_scale", "convention", "stride_in_1x1",
)  # fmt: skip


BOXES_ALONE = {"mask_rcnn": "faster_rcnn", "cascade_mask_rcnn": "cascade_rcnn"}
"""The families that learn from masks, and what each is without."""

SEGMENTERS = ("pspnet", "deeplabv3")
"""The families that learn from label maps; the others are detectors."""


def needs_masks(config: ModelConfig) -> bool:
    """Whether the detector of a section learns from masks; told before data are read and it is built."""
    return _family(config) in BOXES_ALONE


def check_targets(config: ModelConfig, train: Split, student: Model | None = None) -> None:
    """Refuse training images that lack what the model of a section, or a student object, learns from.

    Raises:
        UserError: they have no label maps, or label maps alone; or boxes only, and it learns from masks.
    """
    family = _family(config) if student is None else type(student).__name__
    task = ("segmentation" if family in SEGMENTERS else "detection") if student is None else student.task
    if task == "segmentation" and not train.has_label_maps:
        raise UserError(
            f"{train.source}: has no label maps, and {family} learns from them: take other data, or a detector"
        )
    if task == "detection" and train.has_label_maps:
        raise UserError(
            f"{train.source}: has label maps and no boxes: use {' or '.join(SEGMENTERS)}, not {family}"
        )
    if family in BOXES_ALONE and not train.has_masks:
        raise UserError(
            f"{train.source}: has boxes only, and {family} learns from masks: use {BOXES_ALONE[family]}"
        )


def _family(config: ModelConfig) -> str:
    """The file's own, where the section starts from a file that detdistill saved."""
    if config.weights in (None, "torchvision"):
        return config.family
    spec = read_spec(find_weights(config.weights))
    return config.family if spec is None else spec["model"]["family"]


def build_model(config: ModelConfig, classes: Sequence[str]) -> Model:
    """Build the detector that a recipe's ``student`` section describes.

    ``backbone_weights`` are loaded first, ``weights`` over them. The backbone must load whole; where the head
    does not, it stays as initialised and a warning holds the report. A file saved by detdistill knows its
    architecture: what the section does not say is then taken from the file, and class rows are chosen by name.
    Files of torchvision's detectors are recognised by their names.

    Args:
        config: the section.
        classes: the data's class names.

    Returns:
        A detector with ``spec`` set, on the CPU, in training mode.

    Raises:
        UserError: unknown backbone or stride, weights that cannot be had or read, or that do not fit.
    """
    return _build(config, classes, require=("backbone",))


def load_teacher(config: ModelConfig, classes: Sequence[str]) -> Model:
    """Build the detector that a recipe's ``teacher`` section describes; all of it must load.

    Args:
        config: the section; ``weights`` alone is enough for a run folder or a file saved by detdistill.
        classes: the data's class names. A teacher whose file names its classes keeps those, since teacher and
            student classes meet by name; of published weights the rows of these classes are taken.

    Returns:
        As :func:`build_model`, in evaluation mode.

    Raises:
        UserError: as :func:`build_model`, and where an entry of backbone, neck or head did not load, or a class
            has no row.
    """
    if config.weights is None and config.python is None:
        raise UserError("teacher.weights is missing: an untrained teacher teaches noise")
    return _build(config, classes, require=PARTS).eval()


def _build(config: ModelConfig, classes: Sequence[str], require: Sequence[str]) -> Model:
    if config.python is not None:
        raise UserError(
            f"{config.python}: a Python object, which no recipe can build: give it to detdistill.distill again"
        )
    if config.weights is None:
        return construct(config, classes)
    if config.weights == "torchvision":
        model = construct(config, classes)
        report = _load_published(model, config, require)
    else:
        path = find_weights(config.weights)
        spec = read_spec(path)
        if spec is not None:
            require_buildable(spec, path)
            config = _with_spec(config, spec, path)
            classes = spec["classes"] if require == PARTS else classes
        model = construct(config, classes, spec)
        require_forward(model, path)
        state, source = read_state_dict(path), str(path)
        if torchvision_weights.is_torchvision(state):
            categories, epsilon = torchvision_weights.conventions_of(state, classes)
            report = torchvision_weights.load_torchvision(
                model, state, categories, require=require, norm_epsilon=epsilon, source=source
            )
        else:
            rows = spec["classes"] if spec is not None else None
            report = load_weights(model, state, require=require, classes=rows, source=source)
    _tell(report)
    return model


def construct(config: ModelConfig, classes: Sequence[str], spec: dict[str, Any] | None = None) -> Model:
    """The model without detector weights; the input convention of ``spec`` if there is one."""
    require_memory_for_model(config)
    options: dict[str, Any] = {
        "classes": names_of(classes, "classes"),
        "channels": config.channels,
        "norm": config.norm,
        "freeze_stages": config.freeze_stages,
        "pretrained_backbone": config.backbone_weights == "imagenet",
        "score_threshold": config.score_threshold,
        "nms_threshold": config.nms_threshold,
        "max_detections": config.max_detections,
    }
    for name in ("head_depth", "strides", "anchor_scale", "convention", "stride_in_1x1", "window"):
        if getattr(config, name) != ModelConfig.model_fields[name].get_default():
            options[name] = getattr(config, name)
    build = FAMILIES[config.family]
    if spec is not None and "transformers" in spec:
        options["config"] = spec["transformers"]
    for name in sorted(options.keys() - inspect.signature(build).parameters.keys()):
        if (
            name in ModelConfig.model_fields
            and getattr(config, name) == ModelConfig.model_fields[name].get_default()
        ):
            del options[name]
        else:
            raise UserError(f"{name} is given, but {config.family} has none: leave it out")
    model: Any = build(config.backbone, **options)
    mean, std = _normalisation(config, model, spec)
    given = {"size": config.size, "keep_ratio": config.keep_ratio}
    given = {name: value for name, value in given.items() if value is not None}  # else the family's own
    model.preprocessor = replace(model.preprocessor, mean=mean, std=std, **given)
    if config.backbone_weights not in (None, "imagenet"):
        report = load_backbone(
            model.backbone, read_state_dict(config.backbone_weights), source=str(config.backbone_weights)
        )
        _tell(report)
    model.spec = {
        # Where weights came from is the run's affair: a file carries no paths of the machine that made it.
        "model": config.model_dump(mode="json") | {"weights": None, "backbone_weights": None},
        "classes": list(classes),
        "mean": list(mean),
        "std": list(std),
    } | ({"transformers": options["config"]} if "config" in options else {})
    return model


def require_buildable(spec: dict[str, Any], path: Path) -> None:
    """Refuse a spec whose model its file cannot hold, before memory is taken for it.

    Args:
        spec: of the schema of :class:`~detdistill.models.spec.Spec`.
        path: the weights file that says it.

    Raises:
        UserError: no model can be built from it, or one much larger than the file.
    """
    config = ModelConfig.model_validate({**spec["model"], "weights": None, "backbone_weights": None})
    try:
        with torch.device("meta"):  # shapes without values
            model = construct(config, spec["classes"], spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (
        Exception
    ) as error:  # of torch, timm or transformers, which were not written for a stranger's numbers
        raise _unusable(error, path) from error
    needed, size = sum(parameter.nbytes for parameter in model.parameters()), path.stat().st_size
    if needed > 4 * size + 2**20:  # 4: of 32 bits where the file has 8
        raise UserError(
            f"{path}: says that it holds a model of {needed / 2**20:,.0f} MiB, and has "
            f"{size / 2**20:,.1f} MiB; it is damaged: save it again"
        )


def require_forward(model: Model, path: Path) -> None:
    """Refuse a transformers configuration whose numbers make a model that cannot run.

    Args:
        model: built from a spec; of a family from here it is not run.
        path: the weights file that says it.

    Raises:
        UserError: a small image does not pass through it.
    """
    if "transformers" not in (model.spec or {}):
        return
    batch = Batch(torch.zeros(1, 3, 64, 64), [(64, 64)], [(64, 64)], None)
    try:
        with eval_mode(model), torch.no_grad():
            model.predict(model.pyramid(batch), batch)
    except Exception as error:  # as above
        raise _unusable(error, path) from error


def _unusable(error: Exception, path: Path) -> UserError:
    return UserError(
        f"{path}: no model can be built from what it says ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:160]}); save it again"
    )


def _normalisation(
    config: ModelConfig, model: Any, spec: dict[str, Any] | None
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    if spec is not None:
        return tuple(spec["mean"]), tuple(spec["std"])
    if config.backbone_weights is not None:
        return model.backbone.mean, model.backbone.std
    return model.preprocessor.mean, model.preprocessor.std


def _with_spec(config: ModelConfig, spec: dict[str, Any], path: Path) -> ModelConfig:
    """The section, completed from the file's spec wherever it says nothing."""
    stored = ModelConfig.model_validate(spec["model"])
    given = {name: getattr(config, name) for name in config.model_fields_set}
    for name in ARCHITECTURE:
        if given.get(name) is None:  # "the family's own" is no other architecture
            given.pop(name, None)
        elif given[name] != getattr(stored, name):
            raise UserError(
                f"{path}: was trained with {name}: {getattr(stored, name)}, the recipe says {given[name]}; "
                f"leave {name} out"
            )
    return stored.model_copy(update={**given, "weights": config.weights, "backbone_weights": None})


def _load_published(model: Model, config: ModelConfig, require: Sequence[str]) -> LoadReport:
    if config.size is None:
        logger.warning(
            "torchvision's weights were trained at size %s; without `size` images are taken as they come",
            list(torchvision_weights.TRAINED_SIZE),
        )
    state, categories, epsilon = torchvision_weights.download(config.family)
    source = f"torchvision's {config.family}"
    return torchvision_weights.load_torchvision(
        model, state, categories, require=require, norm_epsilon=epsilon, source=source
    )


def _tell(report: LoadReport) -> None:
    logger.log(logging.INFO if report.complete else logging.WARNING, "%s", report)
