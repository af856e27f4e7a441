"""``benchmark``: what teacher and student cost, side by side (the paper's Table 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detdistill.config import UserError, load_recipe
from detdistill.evaluation.efficiency import Efficiency, efficiency
from detdistill.experiments.evaluate import as_model, choose_device
from detdistill.models import build_model
from detdistill.models.base import Model


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
        models: detectors, run folders, weights files, or recipes. Of a recipe the student is built (its weights
            do not matter here), and the teacher where there is one, named ``RECIPE teacher``.
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
    if recipe.teacher is not None and recipe.teacher.weights not in (None, "torchvision"):
        models[f"{path.stem} teacher"] = as_model(str(recipe.teacher.weights))
        classes = recipe.data.classes or models[f"{path.stem} teacher"].classes
    student = recipe.student.model_copy(update={"weights": None, "backbone_weights": None})
    models[f"{path.stem} student"] = build_model(student, classes)
    return models
