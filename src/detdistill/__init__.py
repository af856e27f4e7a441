"""Teach a small object detector with a big one.

The public names, each loaded when it is first used: ``import detdistill`` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detdistill.config import Recipe, UserError, load_recipe
    from detdistill.distillation.matching import LevelAligner
    from detdistill.distillation.methods import METHODS
    from detdistill.distillation.methods.ima import IMALoss
    from detdistill.distillation.methods.mimic import MimicLoss
    from detdistill.distillation.pair import Pair
    from detdistill.distillation.signals import Method, Setting, Signals
    from detdistill.experiments.analyze import analyze
    from detdistill.experiments.check import check
    from detdistill.experiments.compare import compare
    from detdistill.experiments.evaluate import evaluate
    from detdistill.experiments.export import export
    from detdistill.experiments.predict import iter_predictions, predict
    from detdistill.experiments.quantize import quantize
    from detdistill.experiments.rank_teachers import rank_teachers
    from detdistill.experiments.report import write_report
    from detdistill.experiments.train import distill, train
    from detdistill.models import build_model
    from detdistill.models.base import Preprocess
    from detdistill.models.checkpoints import load_model, save_model
    from detdistill.models.wrapped import wrap
    from detdistill.training.callbacks import Callback

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Callback",
    "IMALoss",
    "LevelAligner",
    "Method",
    "MimicLoss",
    "Pair",
    "Preprocess",
    "Recipe",
    "Setting",
    "Signals",
    "UserError",
    "__version__",
    "analyze",
    "build_model",
    "check",
    "compare",
    "distill",
    "evaluate",
    "export",
    "iter_predictions",
    "load_model",
    "load_recipe",
    "predict",
    "quantize",
    "rank_teachers",
    "save_model",
    "train",
    "wrap",
    "write_report",
]

_HOMES = {
    "Callback": "training.callbacks",
    "IMALoss": "distillation.methods.ima",
    "LevelAligner": "distillation.matching",
    "METHODS": "distillation.methods",
    "Method": "distillation.signals",
    "MimicLoss": "distillation.methods.mimic",
    "Pair": "distillation.pair",
    "Preprocess": "models.base",
    "Recipe": "config",
    "Setting": "distillation.signals",
    "Signals": "distillation.signals",
    "UserError": "config",
    "analyze": "experiments.analyze",
    "build_model": "models",
    "check": "experiments.check",
    "compare": "experiments.compare",
    "distill": "experiments.train",
    "evaluate": "experiments.evaluate",
    "export": "experiments.export",
    "iter_predictions": "experiments.predict",
    "load_model": "models.checkpoints",
    "load_recipe": "config",
    "predict": "experiments.predict",
    "quantize": "experiments.quantize",
    "rank_teachers": "experiments.rank_teachers",
    "save_model": "models.checkpoints",
    "train": "experiments.train",
    "wrap": "models.wrapped",
    "write_report": "experiments.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
