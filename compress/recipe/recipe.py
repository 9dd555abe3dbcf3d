"""Recipe: every option of a run in one validated, serialisable value; all faults are reported at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.errors import RecipeError
from compress.recipe.training import METHODS, TrainingOptions

REDUCIBLE = ("params", "macs", "bytes", "latency")
MOST_CHARACTERS, MOST_NODES = 1 << 20, 100_000  # of a recipe file
MEMORY_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Recipe(BaseModel):
    """What to compress, on which data, how far, and how. Field names are the command line's long options.

    Fractions may be written as percentages.

    At most one of `keep`, `error` and `penalty` says how wide a layer stays; with none of them, and no budget, it is
    the smallest width whose held-back error is at most `tolerance`. `max_drop`, `macs` and `params` are
    budgets over all selected layers and exclude those three. `max_drop` and `min_reduction` are gates as well: a run
    that misses one ends with exit code 3 and writes nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # what
    checkpoint: str = Field(description="path of the checkpoint")
    arch: str | None = Field(None, description="torchvision:NAME, timm:NAME, compress:NAME or package.module:factory")
    arch_arg: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the architecture")
    state_key: str | None = Field(None, description="key of the state dict inside a wrapper dict")
    trust_pickle: bool = Field(False, description="allow the file to execute code while it is read")
    input_shape: tuple[int, ...] | None = Field(None, description="shape of one sample, without the batch")
    # data
    data: str | None = Field(None, description="calibration data")
    eval: str | None = Field(None, description="evaluation data, disjoint from the calibration data")
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    calibration_samples: int = Field(50_000, ge=8, description="at most so many calibration samples are read")
    held_back: float = Field(0.1, gt=0, lt=0.9, description="share of the calibration samples that only checks")
    batch_size: int = Field(128, ge=1)
    # which layers
    layer: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    couple: bool = Field(False, description="also cut residual streams, whose units many layers share")
    # how wide
    keep: int | float | None = Field(
        None, gt=0, description="units to keep of a layer: a whole number from 1 up, a fraction below 1, or 50%"
    )
    error: float | None = Field(
        None, ge=0, lt=1, description="relative error a layer may add on held-back samples; 0: exact"
    )
    penalty: float | None = Field(None, gt=0, lt=1, description="lasso penalty as a fraction of the silencing one")
    merge_aligned: bool = Field(False, description="only merge units that are positive multiples of one another")
    tolerance: float = Field(0.05, gt=0, lt=1, description="relative held-back error of the default width")
    max_drop: float | None = Field(None, ge=0, description="points of accuracy that may be lost")
    macs: float | None = Field(None, gt=0, lt=1, description="fraction of the multiply-accumulates to keep")
    params: float | None = Field(None, gt=0, lt=1, description="fraction of the parameters to keep")
    min_reduction: tuple[str, ...] = Field((), description="gates such as 2x (parameters) or macs:1.5x")
    latency: float | None = Field(None, gt=0, lt=1, description="fraction of the latency at batch 1 to keep, measured")
    round_to: int = Field(1, ge=1, description="kept widths are multiples of this")
    # how
    solver: Literal["newton", "proximal", "conic"] = "newton"
    gap: float = Field(1e-6, gt=0, lt=1, description="relative duality gap at which the solver may stop")
    unit_costs: Literal["path", "one", "feature"] = "path"
    selection: Literal["best", "backward", "forward", "lasso", "adaptive", "pivoted", "magnitude"] = "best"
    allow_bias: bool = Field(False, description="a consumer without a bias may get one")
    ridge: float = Field(1e-6, ge=0, lt=1, description="ridge of the refit, relative to the mean feature energy")
    rank_tolerance: float = Field(1e-3, gt=0, lt=1, description="relative singular value that counts towards a rank")
    refine: int = Field(
        2, ge=0, le=20, description="sweeps after a cut under a budget that refit what comes through the next ReLU"
    )
    finetune: int | str | None = Field(
        None, description="after the cut: a number of label-free distillation steps, or a method trained with labels"
    )
    training: TrainingOptions | None = Field(None, description="how train, finetune and a finetune method train")
    seed: int = Field(0, ge=0)
    device: str = "cpu"
    memory: str = Field("4G", description="bound on what recording and solving one layer may hold")
    # where to
    output: str | None = None
    force: bool = False
    export: tuple[Literal["onnx", "pt2", "hf"], ...] = Field((), description="further formats, each checked")

    @field_validator("held_back", "error", "penalty", "tolerance", "macs", "params", "latency", mode="before")
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

    @field_validator("finetune", mode="before")
    @classmethod
    def _finetune_is_a_number_or_a_method(cls, value: Any) -> Any:
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if number is None or number in METHODS or (type(number) is int and number >= 1):
            return number
        raise ValueError(f"a number of label-free steps or one of {', '.join(METHODS)} was expected, got {value!r}")

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
            faults.append(f"give one of keep, error and penalty, got {', '.join(rules)}")
        if self.merge_aligned and [*rules, *(name for name in budgets if name != "max_drop")]:
            faults.append("merge_aligned keeps the outputs as they are; give it without another width rule or budget")
        if rules and [name for name in budgets if name != "max_drop"]:
            faults.append(f"{rules[0]} fixes the widths that {budgets[-1]} would search for; give one of them")
        if self.max_drop is not None and self.eval is None:
            faults.append("max_drop needs evaluation data: give eval")
        if isinstance(self.finetune, str) and self.training is not None and self.training.searches:
            faults.append("a target sparsity is searched for by train and finetune, not after a cut")
        if (self.mean is None) != (self.std is None):
            faults.append("give mean and std together")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def memory_bytes(self) -> int:
        """The memory bound in bytes."""
        return parse_bytes(self.memory)

    @property
    def budgets(self) -> dict[str, float]:
        """The fractions of a cost that may stay, by the cost's name."""
        return {name: value for name in ("macs", "params", "latency") if (value := getattr(self, name)) is not None}


def parse_percentage(value: Any) -> Any:
    """The fraction that a text such as `50%` names; anything else as it is. Raises ValueError."""
    if not isinstance(value, str) or not value.strip().endswith("%"):
        return value
    try:
        return float(value.strip().removesuffix("%")) / 100
    except ValueError:
        raise ValueError(f"a fraction such as 0.5, or 50%, was expected, got {value!r}") from None


def parse_keep(value: Any) -> Any:
    """A count of units (int from 1 up) or a fraction (float below 1) of a number, or of a text such as 64, 0.5 or 50%.

    What is no number is left to the field's type. Raises ValueError.
    """
    expected = "a whole number of units, a fraction below 1 or a percentage below 100% was expected"
    percentage = isinstance(value, str) and value.strip().endswith("%")
    text = str(value).strip()
    value = parse_percentage(value)
    if isinstance(value, str):
        try:
            value = int(text)
        except ValueError:
            try:
                value = float(text)
            except ValueError:
                raise ValueError(f"{expected}, got {text!r}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{expected}, got {value!r}")
    if not value > 0 or math.isinf(value):
        raise ValueError(f"{expected}, got {text}")
    if isinstance(value, int) or value < 1:
        return value
    if value == 1 and not percentage:
        raise ValueError(
            f"{text} is ambiguous: 1 keeps one unit of every layer, a fraction or a percentage below 100% that share"
        )
    if percentage or value != int(value):
        raise ValueError(f"{expected}, got {text}")
    return int(value)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `512M` or `4G`. Raises ValueError."""
    cleaned = text.strip().upper().removesuffix("B").removesuffix("I")
    suffix = cleaned[-1:] if cleaned[-1:].isalpha() else ""
    number = cleaned.removesuffix(suffix)
    try:
        size = int(float(number) * MEMORY_UNITS[suffix])
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"a size such as 512M or 4G was expected, got {text!r}") from None
    if size <= 0:
        raise ValueError(f"a positive size was expected, got {text!r}")
    return size


def parse_reduction(text: str) -> tuple[str, float]:
    """What must shrink and by which factor: `2x` and `params:2x` are parameters, `macs:1.5` MACs. Raises ValueError."""
    quantity, colon, number = text.strip().lower().rpartition(":")
    quantity = quantity.strip() if colon else "params"
    try:
        factor = float(number.strip().removesuffix("x").removesuffix("×"))
    except ValueError:
        factor = math.nan
    if quantity not in REDUCIBLE or not 1 <= factor < math.inf:
        raise ValueError(f"a factor such as 2x, or one of {', '.join(REDUCIBLE)} with it (macs:2x), got {text!r}")
    return quantity, factor


def make_recipe(options: Mapping[str, Any], source: str = "options") -> Recipe:
    """Recipe of `options` (those that are None are left at their default).

    Raises:
        RecipeError: one line that names every fault at once.
    """
    try:
        return Recipe(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            name = ".".join(str(part) for part in fault["loc"])
            message = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                message = "unknown option"
            elif fault["type"] != "value_error":
                message = f"{message[:1].lower()}{message[1:]}, got {fault['input']!r}"
            faults.append(f"{name}: {message}" if name else message)
        raise RecipeError(f"{source}: {'; '.join(faults)}.") from None


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
