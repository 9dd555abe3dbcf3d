"""The command line: parse, call one function of the api, render. Results go to stdout, progress to stderr.

Exit codes: 0 done, 1 a fault in input or run, 2 usage, 3 the gate failed, 4 nothing could be compressed,
5 architecture or file not supported, 130 interrupted.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
import yaml
from typer import Argument, Option
from typer.core import TyperGroup

from compress.errors import CompressError, RecipeError
from compress.recipe import Recipe, make_recipe, read_recipe

DEFAULT_COMMAND = "run"
INTERRUPTED = 130


class DefaultToRun(TyperGroup):
    """`compress FILE …` is `compress run FILE …`: a first word that names no command is the checkpoint."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front of anything that is neither a command nor a group option."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "--version", "-h"):
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultToRun,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained network smaller without retraining it: `compress FILE --data DATA` is the main job.\n\n"
    "Exit codes: 0 done, 1 a fault in input or run, 2 usage, 3 the accuracy or budget gate failed, "
    "4 nothing could be compressed, 5 architecture or file not supported, 130 interrupted.",
)

INPUT, WIDTHS, HOW, OUTPUT = "Input", "How wide", "How", "Output"

File = Annotated[str, Argument(help="Checkpoint: .pt, .pth, .bin, .tar or .safetensors.", show_default=False)]
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


@app.callback(invoke_without_command=True)
def version_option(
    ctx: typer.Context, version: Annotated[bool, Option("--version", help="Print the version.")] = False
) -> None:
    """Make a trained network smaller without retraining it."""
    if version:
        from importlib.metadata import version as installed_version

        print(f"compress {installed_version('compress-networks')}")
        raise typer.Exit


@app.command("run")
def run_command(
    file: Annotated[str | None, Argument(help="Checkpoint: .pt, .pth, .bin, .tar, .safetensors.")] = None,
    data: Data = None,
    eval_data: Eval = None,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    state_key: StateKey = None,
    trust_pickle: Trust = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    crop: Crop = None,
    calibration_samples: Samples = None,
    held_back: Annotated[
        float | None, Option(help="Share of the calibration samples that only checks.", rich_help_panel=INPUT)
    ] = None,
    batch_size: BatchSize = None,
    layer: Layer = None,
    exclude: Exclude = None,
    couple: Couple = None,
    keep: Annotated[
        float | None, Option(help="Units to keep per layer: a count, or a fraction below 1.", rich_help_panel=WIDTHS)
    ] = None,
    error: Annotated[
        float | None,
        Option(help="Relative error a layer may add on held-back samples; 0: exact.", rich_help_panel=WIDTHS),
    ] = None,
    penalty: Annotated[
        float | None,
        Option(help="Lasso penalty as a fraction of the silencing one; keeps its support.", rich_help_panel=WIDTHS),
    ] = None,
    tolerance: Annotated[
        float | None, Option(help="Held-back error of the default widths (0.05).", rich_help_panel=WIDTHS)
    ] = None,
    max_drop: Annotated[
        float | None, Option(help="Points of accuracy that may be lost on --eval.", rich_help_panel=WIDTHS)
    ] = None,
    macs: Annotated[float | None, Option(help="Fraction of the MACs to keep.", rich_help_panel=WIDTHS)] = None,
    params: Annotated[float | None, Option(help="Fraction of the parameters to keep.", rich_help_panel=WIDTHS)] = None,
    round_to: Annotated[int | None, Option(help="Kept widths are multiples of this.", rich_help_panel=WIDTHS)] = None,
    solver: Annotated[
        str | None, Option(help="newton, proximal or conic (cvxpy: SCS, Clarabel).", rich_help_panel=HOW)
    ] = None,
    gap: Annotated[float | None, Option(help="Relative duality gap to reach.", rich_help_panel=HOW)] = None,
    unit_costs: Annotated[
        str | None, Option(help="path (‖w‖, the theory's), one or feature.", rich_help_panel=HOW)
    ] = None,
    selection: Annotated[
        str | None, Option(help="best, backward, forward, lasso, adaptive, pivoted or magnitude.", rich_help_panel=HOW)
    ] = None,
    ridge: Annotated[float | None, Option(help="Relative ridge of the refit.", rich_help_panel=HOW)] = None,
    rank_tolerance: Annotated[
        float | None, Option(help="Relative singular value that counts.", rich_help_panel=HOW)
    ] = None,
    seed: Seed = None,
    device: Device = None,
    memory: Memory = None,
    recipe: RecipeFile = None,
    output: Annotated[str | None, Option("--output", "-o", help="Folder to write.", rich_help_panel=OUTPUT)] = None,
    force: Annotated[
        bool | None, Option("--force", help="Replace a folder written before.", rich_help_panel=OUTPUT)
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Do everything but write.", rich_help_panel=OUTPUT)] = False,
    as_json: Json = False,
) -> None:
    """Compress a checkpoint: `compress vgg19.pt --layer classifier --data train.npz --eval test.npz`."""
    options = dict(locals())
    for name in ("recipe", "dry_run", "as_json"):
        del options[name]
    resolved = resolve_recipe(options, recipe)
    from compress.api import run
    from compress.display import StderrProgress, show_run

    with StderrProgress() as progress:
        result = run(resolved, progress, dry_run=dry_run)
    if as_json:
        print_json(result.report)
    else:
        show_run(result.report, result.folder)


@app.command("inspect")
def inspect_command(
    file: File,
    data: Data = None,
    arch: Arch = None,
    arch_arg: ArchArg = None,
    state_key: StateKey = None,
    trust_pickle: Trust = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    crop: Crop = None,
    calibration_samples: Samples = None,
    batch_size: BatchSize = None,
    layer: Layer = None,
    exclude: Exclude = None,
    couple: Couple = None,
    seed: Seed = None,
    device: Device = None,
    memory: Memory = None,
    recipe: RecipeFile = None,
    as_json: Json = False,
) -> None:
    """Show what could be compressed: `compress inspect vgg19.pt --data train.npz`. Nothing is solved or written."""
    options = dict(locals())
    for name in ("recipe", "as_json"):
        del options[name]
    resolved = resolve_recipe(options, recipe)
    from compress.api import inspect
    from compress.display import StderrProgress, show_inspection

    with StderrProgress() as progress:
        found = inspect(resolved, progress)
    if as_json:
        print_json(found)
    else:
        show_inspection(found)


@app.command("evaluate")
def evaluate_command(
    folder: Annotated[str, Argument(help="Folder written by a run.", show_default=False)],
    eval_data: Annotated[str, Option("--eval", help="Evaluation data, as for a run.")],
    batch_size: Annotated[int, Option(help="Samples per batch.")] = 128,
    device: Annotated[str, Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Measure a written artifact again: `compress evaluate OUT --eval test.npz`."""
    from compress.api import evaluate
    from compress.display import StderrProgress, show_evaluation

    with StderrProgress() as progress:
        found = evaluate(folder, eval_data, batch_size=batch_size, device=device, progress=progress)
    if as_json:
        print_json(found)
    else:
        show_evaluation(found)


@app.command("demo")
def demo_command(
    output: Annotated[str, Option("--output", "-o", help="Folder to write.")] = "compress-demo",
    force: Annotated[bool, Option("--force", help="Replace a folder written before.")] = False,
    as_json: Json = False,
) -> None:
    """Compress the packaged digits network, from file to report: `compress demo`. Needs no network access."""
    from compress.api import demo_recipe, run
    from compress.display import StderrProgress, show_run

    with StderrProgress() as progress:
        result = run(demo_recipe(output, force=force), progress)
    if as_json:
        print_json(result.report)
    else:
        show_run(result.report, result.folder)


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
    if "checkpoint" not in merged:
        raise RecipeError("No checkpoint: give a file, or a --recipe that names one.")
    return make_recipe(merged, source=recipe_file or "options")


RENAMED = {"file": "checkpoint", "eval_data": "eval"}


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; every expected fault is one line on stderr and its exit code."""
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except CompressError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written.", INTERRUPTED)
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return fail("interrupted; nothing was written.", INTERRUPTED)
    except MemoryError:
        return fail("not enough memory; give a smaller --batch-size or --memory.", 1)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            return fail(f"{error.format_message()} Try --help.", 2)
        raise
    if code == INTERRUPTED:  # typer's own answer to Ctrl-C
        return fail("interrupted; nothing was written.", INTERRUPTED)
    return code if isinstance(code, int) else 0


def fail(message: str, code: int) -> int:
    """Print one line on stderr and hand the exit code on."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def entry() -> None:
    """The console script. A polite kill is an interruption like Ctrl-C, so that temporary files go."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())


if __name__ == "__main__":
    entry()
