"""Recipe: validation, parsing, the way to YAML and back."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress.convex import METHODS, SOLVERS
from compress.errors import RecipeError
from compress.recipe import Recipe, format_recipe, make_recipe, parse_bytes, read_recipe


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({"checkpoint": "x.pt", "keep": -1, "batch_size": 0, "solver": "magic", "colour": "red"})
    message = str(caught.value)
    assert "\n" not in message
    for name in ("keep", "batch_size", "solver", "colour"):
        assert name in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 4, "error": 0.1}, "`keep`, `error`"),
        ({"keep": 4, "macs": 0.5}, "macs"),
        ({"max_drop": 1.0}, "eval"),
        ({"mean": (0.5,)}, "std"),
        ({"mean": (0.5,), "std": (0.0,)}, "positive"),
        ({"keep": 4.5}, "whole number"),
        ({"keep": 1.0}, "ambiguous"),
        ({"keep": "1.0"}, "ambiguous"),
        ({"keep": "100%"}, "below 100%"),
        ({"keep": "0%"}, "below 100%"),
        ({"keep": True}, "whole number"),
        ({"keep": "half"}, "whole number"),
        ({"macs": "half%"}, "50%"),
        ({"output": ""}, "name of a folder"),
        ({"memory": "lots"}, "512M"),
    ],
)
def test_options_that_contradict_are_refused_with_what_to_do(options: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe({"checkpoint": "x.pt", **options})


def test_the_recipe_knows_the_same_methods_as_the_engine() -> None:
    fields = Recipe.model_fields
    assert set(get_args(fields["selection"].annotation)) == {"best", *METHODS}
    assert set(get_args(fields["solver"].annotation)) == set(SOLVERS)


def test_every_shipped_recipe_is_valid() -> None:
    paths = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        make_recipe({"checkpoint": "x.pt", **read_recipe(path)}, str(path))


def test_a_recipe_survives_yaml(tmp_path: Path) -> None:
    recipe = make_recipe(
        {"checkpoint": "x.pt", "layer": ["classifier"], "keep": 0.1, "mean": [0.1, 0.2], "std": [1.0, 2.0], "crop": 24}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(format_recipe(recipe), encoding="utf-8")
    assert make_recipe(read_recipe(path)) == recipe


def test_the_yaml_names_every_option() -> None:
    recipe = make_recipe({"checkpoint": "x.pt"})
    assert list(yaml.safe_load(format_recipe(recipe))) == list(type(recipe).model_fields)


@pytest.mark.parametrize(
    ("given", "read"), [("1", 1), (1, 1), ("47", 47), (47.0, 47), ("0.99", 0.99), ("50%", 0.5), (" 12.5 %", 0.125)]
)
def test_keep_is_a_count_a_fraction_or_a_percentage(given: object, read: float, tmp_path: Path) -> None:
    recipe = make_recipe({"checkpoint": "x.pt", "keep": given})
    assert (recipe.keep, type(recipe.keep)) == (read, type(read))
    path = tmp_path / "recipe.yaml"
    path.write_text(format_recipe(recipe), encoding="utf-8")
    assert make_recipe(read_recipe(path)) == recipe


@pytest.mark.parametrize("name", ["held_back", "error", "penalty", "tolerance", "macs", "params", "latency"])
def test_every_fraction_may_be_a_percentage(name: str) -> None:
    assert getattr(make_recipe({"checkpoint": "x.pt", name: "25%"}), name) == 0.25


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "!!python/object/apply:os.system ['true']\n", "1: 2\n"])
def test_a_file_that_is_no_mapping_of_names_is_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 2**20), st.sampled_from(["", "K", "M", "G", "KiB", "gb"]))
def test_sizes_are_read_in_binary_units(number: int, suffix: str) -> None:
    factor = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[suffix[:1].upper()]
    assert parse_bytes(f"{number}{suffix}") == number * factor


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        size = parse_bytes(text)
    except ValueError:
        return
    assert size > 0
