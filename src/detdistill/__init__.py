"""Teach a small object detector with a big one.

The public names, each loaded when it is first used: ``import detdistill`` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detdistill.commands.check import check
    from detdistill.commands.predict import iter_predictions, predict
    from detdistill.commands.rank_teachers import rank_teachers
    from detdistill.comparison.analysis import analyze
    from detdistill.comparison.compare import compare
    from detdistill.deployment.export import export
    from detdistill.deployment.quantize import quantize
    from detdistill.distillation.adapters import LevelAligner
    from detdistill.distillation.method import Method, PairContext, StepOutputs
    from detdistill.distillation.methods.ima import IMALoss
    from detdistill.distillation.methods.mimic import MimicLoss
    from detdistill.distillation.pair import Pair
    from detdistill.errors import UserError
    from detdistill.evaluation.evaluate import evaluate
    from detdistill.models import build_model
    from detdistill.models.base import Preprocess
    from detdistill.models.checkpoints.io import load_model, save_model
    from detdistill.models.third_party.wrap import wrap
    from detdistill.recipe import Recipe, load_recipe
    from detdistill.recipe.methods import METHODS, MethodOptions
    from detdistill.report.report import write_report
    from detdistill.training.callbacks import Callback
    from detdistill.training.train import distill, train

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Callback",
    "IMALoss",
    "LevelAligner",
    "Method",
    "MethodOptions",
    "MimicLoss",
    "Pair",
    "PairContext",
    "Preprocess",
    "Recipe",
    "StepOutputs",
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
    "LevelAligner": "distillation.adapters",
    "METHODS": "recipe.methods",
    "Method": "distillation.method",
    "MethodOptions": "recipe.methods",
    "MimicLoss": "distillation.methods.mimic",
    "Pair": "distillation.pair",
    "Preprocess": "models.base",
    "Recipe": "recipe",
    "PairContext": "distillation.method",
    "StepOutputs": "distillation.method",
    "UserError": "errors",
    "analyze": "comparison.analysis",
    "build_model": "models",
    "check": "commands.check",
    "compare": "comparison.compare",
    "distill": "training.train",
    "evaluate": "evaluation.evaluate",
    "export": "deployment.export",
    "iter_predictions": "commands.predict",
    "load_model": "models.checkpoints.io",
    "load_recipe": "recipe",
    "predict": "commands.predict",
    "quantize": "deployment.quantize",
    "rank_teachers": "commands.rank_teachers",
    "save_model": "models.checkpoints.io",
    "train": "training.train",
    "wrap": "models.third_party.wrap",
    "write_report": "report.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
