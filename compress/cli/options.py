"""Options that several commands take, and how option texts become a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import yaml
from typer import Argument, Option

from compress.errors import RecipeError
from compress.recipe import Recipe, make_recipe, read_recipe

INPUT, WIDTHS, HOW, OUTPUT = "Input", "How wide", "How", "Output"

File = Annotated[
    str, Argument(help="Checkpoint: .pt, .pth, .bin, .tar or .safetensors; or a written folder.", show_default=False)
]
Arch = Annotated[
    str | None,
    Option(help="torchvision:NAME, timm:NAME, compress:NAME or package.module:factory.", rich_help_panel=INPUT),
]
ArchArg = Annotated[list[str] | None, Option(help="Argument of the architecture, key=value.", rich_help_panel=INPUT)]
StateKey = Annotated[str | None, Option(help="Key of the state dict in the file.", rich_help_panel=INPUT)]
Trust = Annotated[
    bool | None, Option("--trust-pickle", help="Let the file execute code while it is read.", rich_help_panel=INPUT)
]
InputShape = Annotated[str | None, Option(help="Shape of one sample, such as 3,32,32.", rich_help_panel=INPUT)]
Data = Annotated[
    str | None,
    Option(
        help="Calibration data: folder:PATH, npz:PATH, safetensors:PATH, torchvision:NAME?root=…, "
        "module:function, digits, or a path.",
        rich_help_panel=INPUT,
    ),
]
Eval = Annotated[str | None, Option("--eval", help="Evaluation data, as --data.", rich_help_panel=INPUT)]
Mean = Annotated[str | None, Option(help="Channel means, such as .49,.48,.45.", rich_help_panel=INPUT)]
Std = Annotated[str | None, Option(help="Channel standard deviations.", rich_help_panel=INPUT)]
Resize = Annotated[str | None, Option(help="Shorter side, or H,W.", rich_help_panel=INPUT)]
Crop = Annotated[str | None, Option(help="Centre crop: side, or H,W.", rich_help_panel=INPUT)]
BatchSize = Annotated[int | None, Option(help="Samples per batch.", rich_help_panel=INPUT)]
Samples = Annotated[int | None, Option(help="At most so many calibration samples.", rich_help_panel=INPUT)]
Layer = Annotated[list[str] | None, Option(help="Only layers matching this glob or below it.", rich_help_panel=WIDTHS)]
Exclude = Annotated[list[str] | None, Option(help="Not the layers matching this glob.", rich_help_panel=WIDTHS)]
Seed = Annotated[int | None, Option(help="Seed of every random choice.", rich_help_panel=HOW)]
Device = Annotated[str | None, Option(help="cpu, cuda or cuda:N.", rich_help_panel=HOW)]
Memory = Annotated[str | None, Option(help="Bound on one layer's moments, such as 4G.", rich_help_panel=HOW)]
Couple = Annotated[bool | None, Option("--couple", help="Also cut residual streams.", rich_help_panel=WIDTHS)]
Json = Annotated[bool, Option("--json", help="Print the report as JSON.", rich_help_panel=OUTPUT)]
RecipeFile = Annotated[str | None, Option(help="YAML with any of these options.", rich_help_panel=INPUT)]
RENAMED = {"file": "checkpoint", "eval_data": "eval"}


def resolve_recipe(options: Mapping[str, Any], recipe_file: str | None) -> Recipe:
    """The recipe of the given options, over those of the recipe file. Raises RecipeError naming all faults."""
    given = {name: value for name, value in options.items() if value is not None}
    faults: list[str] = []
    for name, parse in PARSED.items():
        if name in given:
            try:
                given[name] = parse(given[name])
            except ValueError as error:
                faults.append(f"{name}: {error}")
    if faults:
        raise RecipeError("; ".join(faults) + ".")
    given = {RENAMED.get(name, name): value for name, value in given.items()}
    base = read_recipe(recipe_file) if recipe_file else {}
    merged = {**base, **given}
    if isinstance(base.get("training"), dict) and "training" in given:
        merged["training"] = {**base["training"], **given["training"]}
    if "checkpoint" not in merged:
        raise RecipeError("No checkpoint: give a file, or a --recipe that names one.")
    return make_recipe(merged, source=recipe_file or "options")


def parse_numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers. Raises ValueError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"numbers with commas between them were expected, got {text!r}") from None


def parse_counts(text: str) -> tuple[int, ...]:
    """Comma-separated positive whole numbers. Raises ValueError."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise ValueError(f"positive whole numbers with commas between them were expected, got {text!r}")
    return counts


def parse_extent(text: str) -> int | tuple[int, ...]:
    """One side, or height and width. Raises ValueError."""
    counts = parse_counts(text)
    if len(counts) > 2:
        raise ValueError(f"one side, or height,width was expected, got {text!r}")
    return counts[0] if len(counts) == 1 else counts


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """key=value texts with YAML values. Raises ValueError."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"key=value was expected, got {text!r}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            found[name] = value
    return found


PARSED: dict[str, Any] = {
    "arch_arg": parse_assignments,
    "input_shape": parse_counts,
    "mean": parse_numbers,
    "std": parse_numbers,
    "resize": parse_extent,
    "crop": parse_extent,
}


def print_json(value: Mapping[str, Any]) -> None:
    """Pure JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
