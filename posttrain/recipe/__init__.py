"""Recipes: one YAML file a run, in typed sections, checked before anything heavy is imported."""

from posttrain.recipe.load import load
from posttrain.recipe.rules import accelerate_config, launched_processes
from posttrain.recipe.sections import (
    DataSection,
    DataSource,
    EvalSection,
    ParitySection,
    PolicySection,
    Recipe,
    RewardSection,
    RolloutSection,
)
from posttrain.recipe.source import RecipeError, key_values

__all__ = [
    "DataSection",
    "DataSource",
    "EvalSection",
    "ParitySection",
    "PolicySection",
    "Recipe",
    "RecipeError",
    "RewardSection",
    "RolloutSection",
    "accelerate_config",
    "key_values",
    "launched_processes",
    "load",
]
