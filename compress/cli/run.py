"""`compress run`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from compress.cli.app import app
from compress.cli.options import (
    HOW,
    INPUT,
    OUTPUT,
    WIDTHS,
    Arch,
    ArchArg,
    BatchSize,
    Couple,
    Crop,
    Data,
    Device,
    Eval,
    Exclude,
    InputShape,
    Json,
    Layer,
    Mean,
    Memory,
    RecipeFile,
    Resize,
    Samples,
    Seed,
    StateKey,
    Std,
    Trust,
    print_json,
    resolve_recipe,
)
from compress.cli.pipelines import Github, Junit, describe_run, told_to_pipelines
from compress.cli.training_flags import gather_training
from compress.errors import RecipeError


@app.command("run")
def run_command(
    file: Annotated[str | None, Argument(help="Checkpoint: .pt, .pth, .bin, .tar, .safetensors; or a folder.")] = None,
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
        str | None, Option(help="Share of the calibration samples that only checks.", rich_help_panel=INPUT)
    ] = None,
    batch_size: BatchSize = None,
    layer: Layer = None,
    exclude: Exclude = None,
    couple: Couple = None,
    keep: Annotated[
        str | None,
        Option(
            help="Units to keep per layer: a count, or a fraction below 1 such as 0.5 or 50%.", rich_help_panel=WIDTHS
        ),
    ] = None,
    error: Annotated[
        str | None,
        Option(help="Relative error a layer may add on held-back samples; 0: exact.", rich_help_panel=WIDTHS),
    ] = None,
    penalty: Annotated[
        str | None,
        Option(help="Lasso penalty as a fraction of the silencing one; keeps its support.", rich_help_panel=WIDTHS),
    ] = None,
    tolerance: Annotated[
        str | None, Option(help="Held-back error of the default widths (0.05).", rich_help_panel=WIDTHS)
    ] = None,
    max_drop: Annotated[
        float | None, Option(help="Points of accuracy that may be lost on --eval.", rich_help_panel=WIDTHS)
    ] = None,
    macs: Annotated[str | None, Option(help="Fraction of the MACs to keep.", rich_help_panel=WIDTHS)] = None,
    params: Annotated[str | None, Option(help="Fraction of the parameters to keep.", rich_help_panel=WIDTHS)] = None,
    latency: Annotated[
        str | None, Option(help="Fraction of the latency to keep, batch 1, measured here.", rich_help_panel=WIDTHS)
    ] = None,
    min_reduction: Annotated[
        list[str] | None,
        Option(
            help="Gate: at least so many times fewer parameters (2x), MACs (macs:2x), bytes, latency.",
            rich_help_panel=WIDTHS,
        ),
    ] = None,
    merge_aligned: Annotated[
        bool | None,
        Option(
            "--merge-aligned",
            help="Only merge units that are positive multiples of one another; outputs stay the same, checked.",
            rich_help_panel=WIDTHS,
        ),
    ] = None,
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
    allow_bias: Annotated[
        bool | None,
        Option("--allow-bias", help="A layer without a bias that reads cut units may get one.", rich_help_panel=HOW),
    ] = None,
    ridge: Annotated[float | None, Option(help="Relative ridge of the refit.", rich_help_panel=HOW)] = None,
    rank_tolerance: Annotated[
        float | None, Option(help="Relative singular value that counts.", rich_help_panel=HOW)
    ] = None,
    refine: Annotated[
        int | None,
        Option(help="Sweeps after a cut under a budget that refit behind the next ReLU (2).", rich_help_panel=HOW),
    ] = None,
    finetune: Annotated[
        str | None,
        Option(
            help="After the cut: so many steps of label-free distillation, or a method with labels: pathprox, sgd, "
            "lasso, group_lasso, l1. Figures without it stand beside it.",
            rich_help_panel=HOW,
        ),
    ] = None,
    epochs: Annotated[int | None, Option(help="Epochs of a --finetune method (2).", rich_help_panel=HOW)] = None,
    loss: Annotated[
        str | None, Option(help="Loss of a --finetune method: cross_entropy, squared, poisson.", rich_help_panel=HOW)
    ] = None,
    seed: Seed = None,
    device: Device = None,
    memory: Memory = None,
    recipe: RecipeFile = None,
    output: Annotated[str | None, Option("--output", "-o", help="Folder to write.", rich_help_panel=OUTPUT)] = None,
    resume: Annotated[
        str | None,
        Option(
            help="As --output, and go on where a killed run of the same command stopped (state in OUT.state).",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    force: Annotated[
        bool | None, Option("--force", help="Replace a folder written before.", rich_help_panel=OUTPUT)
    ] = None,
    export: Annotated[
        list[str] | None, Option(help="Also write onnx, pt2 or hf; give it again for more.", rich_help_panel=OUTPUT)
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Do everything but write.", rich_help_panel=OUTPUT)] = False,
    as_json: Json = False,
    github: Github = False,
    junit: Junit = None,
) -> None:
    """Compress a checkpoint: `compress vgg19.pt --layer classifier --data train.npz --eval test.npz`."""
    options = gather_training(locals(), ["epochs", "loss"])
    for name in ("recipe", "dry_run", "as_json", "github", "junit", "resume"):
        del options[name]
    if resume is not None:
        if output is not None and output != resume:
            raise RecipeError(f"--resume {resume} and --output {output} name two folders; give one of them.")
        options["output"] = resume
    with told_to_pipelines("compress", github, junit) as outcome:
        resolved = resolve_recipe(options, recipe)
        for name, given in (("epochs", epochs), ("loss", loss)):
            if given is not None and not isinstance(resolved.finetune, str):
                raise RecipeError(f"{name}: only a fine-tuning method has that; give --finetune pathprox, say.")
        from compress.api import run
        from compress.cli.display import StderrProgress, show_run

        with StderrProgress() as progress:
            result = run(resolved, progress, dry_run=dry_run, resume=resume is not None)
        if not result.report:  # under torchrun the first process says it all
            return
        if github or junit:
            describe_run(outcome, result.report, result.folder)
    if as_json:
        print_json(result.report)
    else:
        show_run(result.report, result.folder)
