"""Recipes as YAML files."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from compress.atomic import MARKER
from compress.errors import RecipeError, UntrustedCodeError
from compress.recipe.recipe import Recipe
from compress.strict_json import check_regular

MOST_CHARACTERS, MOST_NODES = 1 << 20, 100_000  # of a recipe file
NETWORKS = {"torchvision", "timm", "compress", "transformers", "chain"}  # schemes that run no code
DATA = {"torchvision", "folder", "npz", "npy", "safetensors", "csv", "parquet", "text", "hf", "tar"}
SCHEMES = {"arch": NETWORKS, "data": DATA, "eval": DATA, "guard": DATA, "metric": set[str]()}
PLAIN = {"checkpoint", "output", "device", "min_reduction", "layer", "exclude"}  # a colon in them means something else


def read_recipe(path: str | Path, *, trust_code: bool = False, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Options in a recipe file (YAML, one mapping of option names to values).

    A recipe of the user's own may name code, as the command line may. One that lies in a folder that a run wrote came
    with that folder: it may not, without `trust_code`.

    Args:
        replaced: options that the caller replaces, so that what the file says of them does not count.

    Raises:
        RecipeError: no such file, or no recipe.
        UntrustedCodeError: it lies in a written folder and names code.
    """
    options = parse_recipe(path)
    if not trust_code and lies_in_artifact(Path(path)):
        remaining = {name: value for name, value in options.items() if name not in replaced}
        if (code := named_code(remaining)) is not None:
            raise UntrustedCodeError(
                f"The recipe {str(path)!r} lies in a written folder and names {code}, which would run code. If you "
                "trust it, give --trust-code, or copy the recipe out of that folder."
            )
    return options


def lies_in_artifact(path: Path) -> bool:
    """Whether a file came with a folder that a run or a training wrote."""
    places = path.absolute().parents[:3]
    return any((place / MARKER).exists() and (place / "model.safetensors").exists() for place in places)


def named_code(value: Any, name: str = "") -> str | None:
    """The first option of a recipe or a zoo file that names code, as `name: value`; None where none does."""
    if isinstance(value, dict):
        entries = [(str(key).replace("-", "_"), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        entries = [(name, inner) for inner in value]
    else:
        trusts = name.startswith("trust_") and value not in (None, False)
        spec = isinstance(value, str) and ":" in value and name not in PLAIN
        scheme = value.partition(":")[0].rpartition("=" if name == "guard" else ":")[2] if spec else ""
        runs = spec and scheme not in SCHEMES.get(name, NETWORKS | DATA)
        return f"{name}: {str(value)[:80]!r}" if trusts or runs else None
    return next((code for key, inner in entries if (code := named_code(inner, key)) is not None), None)


def parse_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError."""
    try:
        check_regular(path)
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:
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
        inner = 0 if isinstance(node, yaml.ScalarNode) else sum(expanded_size(part, known) for part in parts)
        known[id(node)] = 1 + inner
    return known[id(node)]


def format_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every option written out, in the order of the fields."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
