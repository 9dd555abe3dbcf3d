"""Every option of a run and of a training: defined once, validated, read from YAML and written to it."""

from __future__ import annotations

from compress.recipe.bound import Bound
from compress.recipe.files import format_recipe, read_recipe
from compress.recipe.recipe import IN_MEMORY, Recipe, make_recipe
from compress.recipe.texts import parse_bytes, parse_reduction
from compress.recipe.training import METHODS, TrainingOptions

__all__ = [
    "IN_MEMORY",
    "METHODS",
    "Bound",
    "Recipe",
    "TrainingOptions",
    "format_recipe",
    "make_recipe",
    "parse_bytes",
    "parse_reduction",
    "read_recipe",
]
