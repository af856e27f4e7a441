"""From a recipe's model section, or from a saved file, to a detector."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from detdistill.data.records import Split
from detdistill.errors import UserError
from detdistill.models.base import SOURCES, Batch, Model, eval_mode
from detdistill.models.checkpoints import torchvision as torchvision_weights
from detdistill.models.checkpoints.spec import Spec, require_class_names
from detdistill.models.checkpoints.weights import (
    PARTS,
    LoadReport,
    find_weights,
    load_backbone,
    load_weights,
    read_spec,
    read_state_dict,
)
from detdistill.models.layers.backbones import Backbone
from detdistill.models.limits import require_memory_for_model
from detdistill.recipe import ModelConfig, ObjectConfig, names_of
from detdistill.recipe.models import (
    DEFAULT_FAMILY,
    FAMILIES,
    WEIGHTS_OF_A_LIBRARY,
    SavedModelConfig,
    families,
    model_config,
)

logger = logging.getLogger(__name__)

TUNABLE = frozenset({
    "weights", "backbone_weights", "norm", "freeze_stages", "size", "keep_ratio", "score_threshold",
    "nms_threshold", "max_detections", "topk_candidates", "rpn_samples", "roi_samples", "window",
})  # fmt: skip
"""Options that trained weights do not depend on; a file decides on the others."""

WITHOUT_MASKS = {"mask_rcnn": "faster_rcnn", "cascade_mask_rcnn": "cascade_rcnn"}
"""The families that learn from masks, and what each is without."""


def needs_masks(config: ModelConfig) -> bool:
    """Whether the detector of a section learns from masks, before data are read and it is built."""
    return _class_of(config).learns_masks


def check_targets(config: ModelConfig, train: Split, student: Model | None = None) -> None:
    """Refuse training images that lack what the model of a section, or a student object, learns from.

    Raises:
        UserError: they have no label maps, or label maps alone; or boxes only, and it learns from masks.
    """
    if student is None:
        described = _class_of(config)
        family, task, with_masks = (
            described.model_fields["family"].default, described.task, described.learns_masks
        )  # fmt: skip
    else:
        family, task, with_masks = type(student).__name__, student.task, student.needs_masks
    if task == "segmentation" and not train.has_label_maps:
        raise UserError(
            f"{train.source}: has no label maps, and {family} learns from them: take other data, or a detector"
        )
    if task == "detection" and train.has_label_maps:
        segmenters = [name for name, known in families().items() if known.task == "segmentation"]
        raise UserError(
            f"{train.source}: has label maps and no boxes: use {' or '.join(segmenters)}, not {family}"
        )
    if student is None and with_masks and not train.has_masks:
        instead = WITHOUT_MASKS.get(family, "a family without masks")
        raise UserError(f"{train.source}: has boxes only, and {family} learns from masks: use {instead}")


def _class_of(config: ModelConfig) -> type[ModelConfig]:
    """The class of its family; the file's own, where the section starts from a file that detdistill saved."""
    if config.weights in (None, WEIGHTS_OF_A_LIBRARY):
        return type(config)
    spec = read_spec(find_weights(config.weights))
    if spec is not None:
        return type(spec.model)
    return FAMILIES[DEFAULT_FAMILY] if isinstance(config, SavedModelConfig) else type(config)


def build_model(
    model: ModelConfig | Mapping[str, Any] | str, classes: int | Sequence[str], **options: Any
) -> Model:
    """Build the model that a recipe's ``student`` section describes.

    ``backbone_weights`` are loaded first, ``weights`` over them. The backbone must load whole; where the head
    does not, it stays as initialized and a warning holds the report. A file saved by detdistill knows its
    architecture: what the section does not say is then taken from the file, and class rows are chosen by name.
    Files of torchvision's detectors are recognized by their names.

    Args:
        model: a section, or the name of a family, as ``"fcos"``.
        classes: the data's class names, or how many there are.
        options: of the section, as ``backbone="resnet18"``.

    Returns:
        A model with ``config`` set, on the CPU, in training mode: it can be saved, loaded and exported.

    Raises:
        UserError: an option is unknown or impossible, or weights cannot be downloaded, read, or do not fit.

    Example:
        >>> build_model("fcos", ["cat", "dog"], backbone="mobilenetv3_small_050", channels=64)
    """
    section = {"family": model} if isinstance(model, str) else model
    return _build(model_config(section, **options), _class_names(classes), require=("backbone",))


def _class_names(classes: int | Sequence[str]) -> tuple[str, ...]:
    """Raises:
    UserError: what a weights file could not keep: no class, one without a name, or two of one name.
    """
    if isinstance(classes, int) and not isinstance(classes, bool) and classes > 0:
        return tuple(map(str, range(classes)))
    if isinstance(classes, int) or classes is None:
        raise UserError(f"classes is {classes!r}: give a list of names, or a number of at least 1")
    return require_class_names(names_of(classes, "classes"))


def load_teacher(config: ModelConfig, classes: Sequence[str]) -> Model:
    """Build the model that a recipe's ``teacher`` section describes; all of it must load.

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
    if config.weights is None and not isinstance(config, ObjectConfig):
        raise UserError("teacher.weights is missing: an untrained teacher teaches noise")
    return _build(config, classes, require=PARTS).eval()


def _build(config: ModelConfig, classes: Sequence[str], require: Sequence[str]) -> Model:
    if isinstance(config, ObjectConfig):
        raise UserError(
            f"{config.python}: a Python object, which no recipe can build: give it to detdistill.distill again"
        )
    if config.weights is None:
        return construct(config, classes)
    if config.weights == WEIGHTS_OF_A_LIBRARY:
        model = construct(config, classes)
        report = _load_published(model, config, require)
    else:
        path = find_weights(config.weights)
        spec = read_spec(path)
        if spec is not None:
            require_buildable(spec, path)
            config = _completed(config, spec, path)
            classes = spec.classes if require == PARTS else classes
        elif isinstance(config, SavedModelConfig):  # as a section without weights
            config = model_config({**config.given, "family": DEFAULT_FAMILY})
        model = construct(config, classes, spec)
        require_forward(model, path)
        state, source = read_state_dict(path), str(path)
        if torchvision_weights.is_torchvision(state):
            categories, epsilon = torchvision_weights.conventions_of(state, classes)
            report = torchvision_weights.load_torchvision(
                model, state, categories, require=require, norm_epsilon=epsilon, source=source
            )
        else:
            rows = spec.classes if spec is not None else None
            report = load_weights(model, state, require=require, classes=rows, source=source)
    _tell(report)
    return model


def construct(config: ModelConfig, classes: Sequence[str], spec: Spec | None = None) -> Model:
    """The model without the weights of ``weights``; with the input normalization of its file's ``spec``."""
    require_memory_for_model(config)
    model = config.network(classes)
    if spec is not None:
        model.preprocessor = replace(model.preprocessor, mean=spec.mean, std=spec.std)
        model.category_ids = spec.category_ids
    source = getattr(config, "backbone_weights", None)
    if source not in (None, "imagenet"):
        assert isinstance(model.backbone, Backbone)
        _tell(load_backbone(model.backbone, read_state_dict(source), source=str(source)))
    return model


def require_buildable(spec: Spec, path: Path) -> None:
    """Refuse a spec whose model its file cannot hold, before memory is taken for it.

    Args:
        spec: what the file says.
        path: the weights file.

    Raises:
        UserError: no model can be built from it, or one much larger than the file.
    """
    try:
        with torch.device("meta"):  # shapes without values
            model = construct(of_file(spec), spec.classes, spec)
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


def of_file(spec: Spec) -> ModelConfig:
    """The section that a file describes, without the sources that a stranger's file may name."""
    return model_config(spec.model.model_dump(exclude=SOURCES))


def require_forward(model: Model, path: Path) -> None:
    """Refuse a transformers configuration whose numbers make a model that cannot run.

    Args:
        model: built from a spec; of a family from here it is not run.
        path: the weights file that says it.

    Raises:
        UserError: a small image does not pass through it.
    """
    if getattr(model.config, "transformers", None) is None:
        return
    batch = Batch(torch.zeros(1, 3, 64, 64), [(64, 64)], [(64, 64)], None)
    try:
        with eval_mode(model), torch.no_grad():
            model.forward_head(model.forward_features(batch), batch)
    except Exception as error:  # as above
        raise _unusable(error, path) from error


def _unusable(error: Exception, path: Path) -> UserError:
    return UserError(
        f"{path}: no model can be built from what it says ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:160]}); save it again"
    )


def _completed(config: ModelConfig, spec: Spec, path: Path) -> ModelConfig:
    """The section, completed from the file's spec wherever it says nothing."""
    stored = spec.model
    given = {name: value for name, value in config.given.items() if not (value is None and name not in TUNABLE)}
    for name in type(stored).model_fields:
        if name not in TUNABLE and name in given and given[name] != getattr(stored, name):
            raise UserError(
                f"{path}: was trained with {name}: {getattr(stored, name)}, the recipe says {given[name]}; "
                f"leave {name} out"
            )
    return model_config({**stored.model_dump(exclude=SOURCES), **given}, str(path))


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
