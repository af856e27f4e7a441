"""What a recipe may say, without torch: one YAML file is one experiment."""

from __future__ import annotations

from detdistill.recipe.methods import MethodConfig, MethodOptions, method_config
from detdistill.recipe.models import Convention, ModelConfig, ObjectConfig, model_config
from detdistill.recipe.reading import expand_method, names_of
from detdistill.recipe.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from detdistill.recipe.sections import (
    AugmentConfig,
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)

__all__ = [
    "AugmentConfig",
    "Convention",
    "DataConfig",
    "MethodConfig",
    "MethodOptions",
    "ModelConfig",
    "ObjectConfig",
    "OptimizerConfig",
    "Recipe",
    "ScheduleConfig",
    "TrainingConfig",
    "dump_recipe",
    "expand_method",
    "load_recipe",
    "method_config",
    "model_config",
    "names_of",
    "parse_recipe",
]
