"""Recipe: every option of a run in one validated, serialisable value; all faults are reported at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, field_validator, model_validator

from compress.errors import RecipeError
from compress.recipe.bound import Bound
from compress.recipe.faults import explain_faults
from compress.recipe.option import Section, option
from compress.recipe.texts import (
    assignments,
    counts,
    drops,
    extent,
    numbers,
    parse_bytes,
    parse_keep,
    parse_percentage,
    parse_reduction,
    parse_steps,
    strings,
)
from compress.recipe.training import Method, TrainingOptions

IN_MEMORY = "in memory"  # what a program hands over, where a recipe would name a file
GUARD, GUARD_DROP = re.compile(r"([A-Za-z][\w-]*)="), 5.0  # how a guard is named; points that it may lose
METRICS = (
    "top1", "top5", "accuracy", "pixel_accuracy", "mean_iou", "token_accuracy", "f1", "auc", "loss", "perplexity",
    "squared_error", "absolute_error",
)  # fmt: skip
Numbers = Annotated[tuple[float, ...] | None, BeforeValidator(numbers)]
Counts = Annotated[tuple[int, ...] | None, BeforeValidator(counts)]
Extent = Annotated[int | tuple[int, int] | None, BeforeValidator(extent)]
Steps = Annotated[int | Literal["auto", "off"], BeforeValidator(parse_steps)]
Assignments = Annotated[dict[str, Any], BeforeValidator(assignments)]
Weights = Annotated[dict[str, float], BeforeValidator(assignments)]
Drops = Annotated[dict[str, float], BeforeValidator(drops)]
Strings = Annotated[tuple[str, ...], BeforeValidator(strings)]


class Recipe(BaseModel):
    """What to compress, on which data, how far, and how. Each field is an option of the command line as well.

    Fractions may be written as percentages.

    At most one of `keep`, `error` and `penalty` says how wide a layer stays; with none of them, and no budget, it is
    the smallest width whose held-back error is at most `tolerance`, or less where the outputs would move by more than
    `output_tolerance`. `max_drop`, `macs`, `params` and `latency` are budgets over all selected layers and exclude
    those three. `max_drop` and `min_reduction` are gates as well: a run that misses one ends with exit code 3 and
    writes nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = option(
        ..., "Checkpoint: .pt, .pth, .bin, .tar, .safetensors; or a folder.", Section.NETWORK, "FILE"
    )
    arch: str | None = option(
        None, "torchvision:NAME, timm:NAME, compress:NAME, package.module:factory or file.py:factory.",
        Section.NETWORK, "ARCH", everyday=True, default_text="recognised",
    )  # fmt: skip
    arch_arg: Assignments = option(dict, "Argument of the architecture.", Section.NETWORK, "KEY=VALUE")
    state_key: str | None = option(None, "Key of the state dict in the file.", Section.NETWORK, "KEY")
    trust_pickle: bool = option(False, "Let the file execute code while it is read.", Section.NETWORK)
    trust_code: bool = option(
        False, "Import and run the package.module:factory that a written folder names.", Section.NETWORK
    )
    input_shape: Counts = option(None, "Shape of one sample, such as 3,32,32.", Section.NETWORK, "C,H,W")
    data: str | None = option(
        None,
        "Calibration data: the path of a folder or file (.npz, .npy, .csv, …), csv:PATH?label=COLUMN, hf:PATH, "
        "torchvision:NAME?root=…, module:function or digits.",
        Section.DATA, "DATA", everyday=True,
    )  # fmt: skip
    eval: str | None = option(
        None, "Evaluation data, as --data; nothing is chosen on it.", Section.DATA, "DATA", everyday=True
    )
    mean: Numbers = option(None, "Channel means, such as .49,.48,.45.", Section.DATA, "M,…", default_text="the data's")
    std: Numbers = option(None, "Channel standard deviations.", Section.DATA, "S,…", default_text="the data's")
    resize: Extent = option(None, "Shorter side, or H,W.", Section.DATA, "SIDE")
    crop: Extent = option(None, "Centre crop: side, or H,W.", Section.DATA, "SIDE")
    calibration_samples: int = option(
        50_000, "At most so many calibration samples are read.", Section.DATA, "COUNT", ge=8
    )
    held_back: float = option(
        0.1, "Share of the calibration samples that only checks.", Section.DATA, "SHARE", gt=0, lt=0.9
    )
    batch_size: int = option(128, "Samples of one batch.", Section.DATA, "COUNT", ge=1)
    layer: tuple[str, ...] = option(
        (), "Only layers matching this glob or below it.", Section.LAYERS, "GLOB", default_text="all"
    )
    exclude: tuple[str, ...] = option((), "Not the layers matching this glob.", Section.LAYERS, "GLOB")
    couple: bool = option(False, "Also cut residual streams, whose units many layers share.", Section.LAYERS)
    depth: bool = option(
        True, "Under a budget blocks of residual networks may go as a whole, where that does less harm.", Section.LAYERS
    )
    fold: Literal["auto", "on", "off"] = option(
        "auto",
        "Fold batch norms into the layers in front of them, a step less for the same outputs; auto: under --latency, "
        "where that is faster.",
        Section.LAYERS,
    )
    in_place: Literal["auto", "on", "off"] = option(
        "auto",
        "Let activations write over what they read, where nothing else reads it; auto: under --latency, where that is "
        "faster.",
        Section.LAYERS,
    )
    memory_format: Literal["auto", "keep", "channels_last"] = option(
        "auto",
        "Lay convolutions out channels last, with the same outputs; auto: under --latency, where that is faster.",
        Section.LAYERS,
    )
    low_rank: bool = option(
        False,
        "Under a budget layers whose channels cannot all be cut may become two layers of a low rank, where these are "
        "faster.",
        Section.LAYERS,
    )
    keep: int | float | None = option(
        None, "Units to keep in every layer: a count, or a fraction below 1 such as 0.5 or 50%.",
        Section.WIDTHS, "COUNT|SHARE", everyday=True, gt=0,
    )  # fmt: skip
    error: float | None = option(
        None, "Relative error a layer may add on held-back samples; 0: exact.", Section.WIDTHS, "SHARE", ge=0, lt=1
    )
    penalty: float | None = option(
        None, "Lasso penalty as a fraction of the smallest one that keeps no unit; keeps its support.",
        Section.WIDTHS, "SHARE", gt=0, lt=1,
    )  # fmt: skip
    merge_aligned: bool = option(
        False, "Only merge units that are positive multiples of one another; outputs stay the same, checked.",
        Section.WIDTHS,
    )  # fmt: skip
    tolerance: float = option(
        0.05, "Held-back error of the widths where nothing else says how wide.", Section.WIDTHS, "SHARE", gt=0, lt=1
    )
    output_tolerance: float = option(
        0.02,
        "How far held-back outputs may move then: mean nats of scores, squares of numbers relative to their spread. "
        "Where they move further, the layers that move them most are held to smaller errors.",
        Section.WIDTHS, "NUMBER", gt=0,
    )  # fmt: skip
    max_drop: float | None = option(
        None, "Points of accuracy that may be lost on --eval; with --metric in its unit, or 2% of its value.",
        Section.WIDTHS, "POINTS", everyday=True, ge=0,
    )  # fmt: skip
    relative_drop: bool = option(False, "--max-drop is a share of the value before, as 2% says too.", Section.WIDTHS)
    metric: str | None = option(
        None,
        "What --max-drop is of: your module:function of the network, or of outputs and targets of --eval; or one of "
        "top1, top5, mean-iou, f1, auc, perplexity, loss, squared-error, absolute-error.",
        Section.WIDTHS, "METRIC", default_text="accuracy",
    )  # fmt: skip
    lower_is_better: bool = option(False, "Less of your --metric is better.", Section.WIDTHS)
    guard: Strings = option(
        (), "A second domain, NAME=DATA: among the calibration samples, its loss bounded by --guard-drop.",
        Section.WIDTHS, "NAME=DATA",
    )  # fmt: skip
    guard_weight: float = option(
        0.2,
        "Share of the calibration samples that are the guards', all together.",
        Section.WIDTHS,
        "SHARE",
        gt=0,
        le=0.9,
    )
    guard_drop: Drops = option(
        dict, "Points of accuracy, without labels of agreement, that a guard may lose, or all: NAME=POINTS or POINTS.",
        Section.WIDTHS, "NAME=POINTS", default_text="5",
    )  # fmt: skip
    confidence: float | None = option(
        None, "With --max-drop: pass only where so sure that no more is lost (one-sided).", Section.WIDTHS, "SHARE",
        ge=0.5, lt=1, default_text="the estimate decides",
    )  # fmt: skip
    force_gate: bool = option(False, "Let --max-drop pass although the evaluation cannot show a loss.", Section.WIDTHS)
    macs: float | None = option(
        None, "Fraction of the multiply-accumulates to keep.", Section.WIDTHS, "SHARE", everyday=True, gt=0, lt=1
    )
    params: float | None = option(
        None, "Fraction of the parameters to keep.", Section.WIDTHS, "SHARE", everyday=True, gt=0, lt=1
    )
    min_reduction: tuple[str, ...] = option(
        (), "Gate: at least so many times fewer parameters (2x), MACs (macs:2x), bytes, latency.",
        Section.WIDTHS, "FACTOR",
    )  # fmt: skip
    latency: float | None = option(
        None, "Fraction of the latency to keep, measured here.", Section.WIDTHS, "SHARE", gt=0, lt=1
    )
    latency_batch: int = option(1, "Samples of the batch that latency is measured on.", Section.WIDTHS, "COUNT", ge=1)
    latency_threads: int | None = option(
        None, "Threads that latency is measured with.", Section.WIDTHS, "COUNT", ge=1, le=1024, default_text="torch's"
    )
    round_to: int = option(1, "Kept widths are multiples of this.", Section.WIDTHS, "COUNT", ge=1)
    output_weight: Weights = option(
        dict, "Weight of one of several outputs; 0 leaves it out.", Section.WIDTHS, "NAME=NUMBER", default_text="1 each"
    )
    solver: Literal["newton", "proximal", "conic"] = option(
        "newton", "Solver of the certified lasso; conic is cvxpy.", Section.SOLVING
    )
    gap: float = option(
        1e-6, "Relative duality gap at which the solver may stop.", Section.SOLVING, "NUMBER", gt=0, lt=1
    )
    unit_costs: Literal["path", "one", "feature"] = option(
        "path", "What a unit costs in the lasso: path is ‖w‖, the theory's choice.", Section.SOLVING
    )
    selection: Literal["best", "backward", "forward", "lasso", "adaptive", "pivoted", "magnitude"] = option(
        "best", "How the units of a width are chosen.", Section.SOLVING
    )
    allow_bias: bool = option(False, "A layer without a bias that reads cut units may get one.", Section.SOLVING)
    ridge: float = option(
        1e-6, "Ridge of the refit, relative to the mean feature energy.", Section.SOLVING, "NUMBER", ge=0, lt=1
    )
    rank_tolerance: float = option(
        1e-3, "Relative singular value that counts towards a rank.", Section.SOLVING, "NUMBER", gt=0, lt=1
    )
    refine: int = option(
        1, "Sweeps after a cut under a budget that refit what comes through the next ReLU, as long as they gain.",
        Section.RECOVERY, "COUNT", ge=0, le=20,
    )  # fmt: skip
    recover: Steps = option(
        "auto",
        "After the cut: steps of all weights towards the original, without labels, kept where held-back samples gain: "
        "auto (under --macs, --params or --latency, in one to three times the time of the search), off, or how many.",
        Section.RECOVERY, "auto|off|STEPS",
    )  # fmt: skip
    finetune: Method | None = option(
        None, "After the cut: train with the labels of --data; figures without it stand beside it.",
        Section.RECOVERY,
    )  # fmt: skip
    training: TrainingOptions | None = None
    seed: int = option(0, "Seed of every random choice.", Section.MACHINE, "NUMBER", ge=0)
    device: str = option("cpu", "cpu, cuda or cuda:N.", Section.MACHINE, "DEVICE")
    memory: str = option("4G", "Bound on what recording and solving one layer may hold.", Section.MACHINE, "SIZE")
    output: str | None = option(
        None, "Folder to write.", Section.OUTPUT, "FOLDER", everyday=True, default_text="FILE-compressed"
    )
    force: bool = option(False, "Replace what was written before.", Section.OUTPUT, everyday=True)
    export: tuple[Literal["onnx", "pt2", "hf"], ...] = option((), "Also write this format, checked.", Section.OUTPUT)

    @model_validator(mode="before")
    @classmethod
    def _steps_of_finetune_are_recover(cls, options: Any) -> Any:
        """Until 0.1 `finetune` took a number of label-free steps too."""
        if not isinstance(options, Mapping) or not is_count(options.get("finetune")) or options.get("recover"):
            return options
        return {**options, "finetune": None, "recover": options["finetune"]}

    @model_validator(mode="before")
    @classmethod
    def _percentages_of_a_drop_are_relative(cls, options: Any) -> Any:
        if not isinstance(options, Mapping) or not str(options.get("max_drop", "")).strip().endswith("%"):
            return options
        return {**options, "max_drop": parse_percentage(options["max_drop"]), "relative_drop": True}

    @field_validator("metric")
    @classmethod
    def _metric_is_known(cls, value: str | None) -> str | None:
        if value is None or value == IN_MEMORY or ":" in value:
            return value
        name = value.strip().lower().replace("-", "_")
        if name not in METRICS:
            known = ", ".join(metric.replace("_", "-") for metric in METRICS)
            raise ValueError(f"a function as module:name was expected, or one of {known}; got {value!r}")
        return name

    @field_validator(
        "held_back", "guard_weight", "error", "penalty", "tolerance", "macs", "params", "latency", mode="before"
    )
    @classmethod
    def _fractions_may_be_percentages(cls, value: Any) -> Any:
        return parse_percentage(value)

    @field_validator("keep", mode="before")
    @classmethod
    def _keep_is_a_count_or_a_fraction(cls, value: Any) -> Any:
        return None if value is None else parse_keep(value)

    @field_validator("output")
    @classmethod
    def _output_is_named(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or "\0" in value):
            raise ValueError(f"the name of a folder was expected, got {value!r}")
        return value

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, value: str) -> str:
        parse_bytes(value)
        return value

    @field_validator("min_reduction", mode="before")
    @classmethod
    def _reductions_are_factors(cls, value: Any) -> Any:
        texts = (value,) if isinstance(value, (str, int, float)) else value
        for text in texts if isinstance(texts, (list, tuple)) else ():
            parse_reduction(str(text))
        return tuple(str(text) for text in texts) if isinstance(texts, (list, tuple)) else texts

    @field_validator("output_weight")
    @classmethod
    def _weights_are_numbers(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights must be 0 or larger, got {name}={weight:g}")
        return value

    @field_validator("std")
    @classmethod
    def _std_is_positive(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and min(value, default=1.0) <= 0:
            raise ValueError(f"standard deviations must be positive, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _options_agree(self) -> Recipe:
        faults = []
        rules = [name for name in ("keep", "error", "penalty") if getattr(self, name) is not None]
        budgets = [name for name in ("max_drop", "macs", "params", "latency") if getattr(self, name) is not None]
        if len(rules) > 1:
            faults.append(f"give one of `keep`, `error` and `penalty`, got {', '.join(f'`{name}`' for name in rules)}")
        if self.merge_aligned and [*rules, *(name for name in budgets if name != "max_drop")]:
            faults.append("`merge_aligned` keeps the outputs as they are; give it without another width rule or budget")
        if rules and [name for name in budgets if name != "max_drop"]:
            faults.append(f"`{rules[0]}` fixes the widths that `{budgets[-1]}` would search for; give one of them")
        if self.max_drop is not None and self.eval is None and not self.own_metric:
            faults.append("`max_drop` needs evaluation data: give `eval`")
        names = [name for name, _ in self.guards]
        if len(set(names)) < len(names):
            faults.append(f"two guards are called {max(names, key=names.count)}; name them: `guard` NAME=DATA")
        if any(not 0 <= most <= 100 for most in self.guard_drop.values()):
            faults.append("`guard_drop` is points from 0 to 100")
        unknown = [name for name in self.guard_drop if name and name not in names]
        if unknown:
            faults.append(f"`guard_drop` names no guard: {unknown[0]}; there are {', '.join(names) or 'none'}")
        if self.low_rank and (rules or not budgets or self.merge_aligned):
            faults.append("`low_rank` is chosen under `macs`, `params`, `latency` or `max_drop`, without a width rule")
        if self.relative_drop and self.max_drop is None:
            faults.append("`relative_drop` is of a bound: give `max_drop`")
        if self.own_metric and self.confidence is not None:
            faults.append("`confidence` needs one answer a sample, and a function gives one number; leave it out")
        if self.lower_is_better and not self.own_metric:
            faults.append("`lower_is_better` is said of a function; give `metric`")
        if self.confidence is not None and self.max_drop is None:
            faults.append("`confidence` is that of a bound: give `max_drop`")
        if self.finetune is not None and self.training is not None and self.training.searches:
            faults.append("a target sparsity is searched for by train and finetune, not after a cut")
        if self.finetune is not None and isinstance(self.recover, int):
            faults.append("give one of `recover`, without labels, and `finetune`, with them")
        if (self.mean is None) != (self.std is None):
            faults.append("give `mean` and `std` together")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def guards(self) -> list[tuple[str, str]]:
        """Name and data of each guard set."""
        guards = []
        for number, text in enumerate(self.guard, 1):
            named = GUARD.match(text)
            guards.append((named[1], text[named.end() :]) if named else (f"guard{number}", text))
        return guards

    def guard_most(self, name: str) -> float:
        """Points that a guard set may lose."""
        return self.guard_drop.get(name, self.guard_drop.get("", GUARD_DROP))

    @property
    def own_metric(self) -> bool:
        """Whether the metric is the user's own function."""
        return self.metric is not None and (":" in self.metric or self.metric == IN_MEMORY)

    @property
    def bound(self) -> Bound | None:
        """How much may be lost; None where nothing says so."""
        return None if self.max_drop is None else Bound(self.max_drop, self.relative_drop, self.confidence)

    @property
    def memory_bytes(self) -> int:
        """The memory bound in bytes."""
        return parse_bytes(self.memory)

    @property
    def tunes(self) -> bool:
        """Whether the cut network is adjusted as a whole."""
        return self.recovery is not None or self.finetune is not None

    @property
    def recovery(self) -> int | Literal["auto"] | None:
        """Label-free steps after the cut, or that their number is to be found; None for none."""
        if self.finetune is not None or self.recover == "off" or (self.recover == "auto" and not self.budgets):
            return None
        return "auto" if self.recover == "auto" else self.recover

    @property
    def budgets(self) -> dict[str, float]:
        """The fractions of a cost that may stay, by the cost's name."""
        return {name: value for name in ("macs", "params", "latency") if (value := getattr(self, name)) is not None}


def is_count(value: Any) -> bool:
    """Whether a value is a whole number, typed or not."""
    return type(value) is int or (isinstance(value, str) and value.strip().isdecimal())


def make_recipe(options: Mapping[str, Any], source: str = "options", flags: Mapping[str, str] | None = None) -> Recipe:
    """Recipe of `options` (those that are None are left at their default).

    Args:
        source: where the options come from, for the message.
        flags: option -> its spelling on the command line, of those that were given there; a section's are `training.x`.

    Raises:
        RecipeError: one line that names every fault at once.
    """
    try:
        return Recipe(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        raise RecipeError(explain_faults(error, source, flags or {}, Recipe)) from None
