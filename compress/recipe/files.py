"""Recipes as YAML files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from compress.errors import RecipeError
from compress.recipe.recipe import Recipe

MOST_CHARACTERS, MOST_NODES = 1 << 20, 100_000  # of a recipe file


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Options in a recipe file (YAML, one mapping of option names to values). Raises RecipeError."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {str(path)!r} cannot be read: {error}.") from None
    if len(text) > MOST_CHARACTERS:
        raise RecipeError(f"The recipe {str(path)!r} is longer than {MOST_CHARACTERS} characters; it is no recipe.")
    try:
        if (size := expanded_size(yaml.compose(text, yaml.SafeLoader), {})) > MOST_NODES:
            raise RecipeError(f"The recipe {str(path)!r} repeats its anchors into {size} values; it is no recipe.")
        options = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"The recipe {str(path)!r} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise RecipeError(f"The recipe {str(path)!r} must be a mapping of option names to values.")
    return {name.replace("-", "_"): value for name, value in options.items()}


def expanded_size(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Values in a YAML document with every alias written out; infinite where one contains itself."""
    if node is None:
        return 0
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known, which inside of itself it never is
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        own = 0 if isinstance(node, yaml.ScalarNode) else sum(expanded_size(part, known) for part in parts)
        known[id(node)] = 1 + own
    return known[id(node)]


def format_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every option written out, in the order of the fields."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
