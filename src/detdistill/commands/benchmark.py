"""``benchmark``: what teacher and student cost, side by side (the paper's Table 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detdistill.errors import UserError
from detdistill.evaluation.efficiency import Efficiency, efficiency
from detdistill.evaluation.evaluate import as_model, choose_device
from detdistill.models import build_model, load_teacher
from detdistill.models.base import Model
from detdistill.recipe import ModelConfig, load_recipe
from detdistill.recipe.models import model_config
from detdistill.recipe.sections import LONGEST_SIDE


def benchmark(
    models: Sequence[Model | str | Path],
    *,
    size: tuple[int, int] | None = None,
    runs: int = 20,
    warmup: int = 3,
    batch_size: int = 1,
    device: str = "auto",
) -> dict[str, Efficiency]:
    """Parameters, FLOPs, latency, throughput and memory of several detectors, measured in turns.

    Args:
        models: detectors, run folders, weights files, or recipes. Of a recipe these are its student and, where
            there is one, its teacher, ``RECIPE student`` and ``RECIPE teacher``, at the sizes it gives them;
            nothing is downloaded for them.
        size: (height, width) of the image; not given: the largest input size of the models, else 800 × 1088.
        runs, warmup, batch_size: as in :func:`~detdistill.evaluation.efficiency.efficiency`.
        device: ``auto``, ``cpu``, ``cuda:1``, …

    Raises:
        UserError: a model cannot be had, or two have one name.
    """
    where = choose_device(device)
    found: dict[str, Model] = {}
    for model in models:
        for name, detector in _detectors(model).items():
            if name in found:
                raise UserError(f"{name} is given twice: name each model once")
            found[name] = detector.to(where)
    if not found:
        raise UserError("name at least one model: a run folder, a weights file, or a recipe")
    sizes = [
        detector.preprocessor.size for detector in found.values() if detector.preprocessor.size is not None
    ]
    if size is not None and not 1 <= min(size) <= max(size) <= LONGEST_SIDE:
        raise UserError(f"size {size[0]}×{size[1]}: give height and width in pixels, from 1 to {LONGEST_SIDE}")
    size = size or max(sizes, default=(800, 1088))
    return efficiency(found, size, runs=runs, warmup=warmup, batch_size=batch_size)


def _detectors(model: Model | str | Path) -> dict[str, Model]:
    if isinstance(model, Model):
        return {type(model).__name__: model}
    path = Path(model)
    if path.suffix not in (".yaml", ".yml"):
        return {str(path): as_model(path)}
    recipe = load_recipe(path)
    classes = recipe.data.classes or tuple(map(str, range(80)))
    models = {}
    if recipe.teacher is not None:
        models[f"{path.stem} teacher"] = teacher = _built(recipe.teacher, classes)
        classes = recipe.data.classes or teacher.classes
    models[f"{path.stem} student"] = _built(recipe.student, classes)
    return models


def _built(section: ModelConfig, classes: Sequence[str]) -> Model:
    """The model of a section: a weights file says what it is, what would be downloaded does not matter here."""
    downloads = {"backbone_weights"} | ({"weights"} if section.weights == "torchvision" else set())
    section = model_config({name: value for name, value in section.given.items() if name not in downloads})
    return build_model(section, classes) if section.weights is None else load_teacher(section, classes)
