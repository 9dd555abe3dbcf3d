"""What a zoo file asks for: one job a model, every fault of the file in one line before anything starts."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from compress.errors import RecipeError
from compress.recipe import Recipe, make_recipe, parse_bytes, read_recipe

MODELS, LOGS = "models", "logs"
OWN_FIELDS = ("name", "output", "force")  # of an entry: not options of its recipe
PATTERN = re.compile(r"[*?\[]")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


class ZooFile(BaseModel):
    """A zoo file (YAML). `defaults` and the entries of `models` take any option of a recipe.

    An entry's own options win over the defaults. A `checkpoint` with `*`, `?` or `[` is a glob: one model a file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str = Field("zoo", description="folder of the whole run")
    defaults: dict[str, Any] = Field(default_factory=dict, description="options that every model shares")
    models: tuple[dict[str, Any] | str, ...] = Field(min_length=1, description="checkpoints, or mappings of options")
    jobs: int | None = Field(None, ge=1, description="models at once; default: as many as cores, and as memory holds")
    threads: int | None = Field(None, ge=1, description="threads of one model; default: cores / jobs")
    timeout: float | None = Field(None, gt=0, description="seconds that one model may take")
    job_memory: str | None = Field(None, description="memory that one model is expected to take, such as 2G")
    backend: Literal["local", "ray", "slurm"] = "local"
    slurm: dict[str, Any] = Field(default_factory=dict, description="parameters of submitit, such as slurm_partition")

    @field_validator("job_memory")
    @classmethod
    def _memory_is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value


@dataclass(frozen=True)
class Job:
    """One model of a zoo.

    Attributes:
        name: unique in the zoo; names its folder.
        recipe: its options, with the output folder filled in.
        memory: bytes it is expected to take at most.
        threads: of its process.
        timeout: seconds it may take; None: any.
        log: file that takes what the process prints.
        scratch: folder for its temporary files.
        fingerprint: of everything that determines its result.
    """

    name: str
    recipe: Recipe
    memory: int
    threads: int
    timeout: float | None
    log: str
    scratch: str
    fingerprint: str = ""

    @property
    def folder(self) -> Path:
        """Where its artifact goes."""
        return Path(str(self.recipe.output))

    @property
    def wants_gpu(self) -> bool:
        """Whether it computes on an accelerator."""
        return self.recipe.device != "cpu"


@dataclass(frozen=True)
class Shard:
    """The `index`-th of `count` parts of a zoo, from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`2/4` is the second of four. Raises RecipeError."""
        first, slash, last = text.partition("/")
        if slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
            return cls(int(first), int(last))
        raise RecipeError(f"shard: i/n with 1 ≤ i ≤ n was expected, such as 2/4, got {text!r}.")

    @property
    def suffix(self) -> str:
        """What its files carry in their names; nothing for the whole."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"


@dataclass(frozen=True)
class ZooPlan:
    """A zoo, resolved: its folder, its settings, and a recipe for every model in a fixed order."""

    output: Path
    settings: ZooFile
    models: tuple[tuple[str, Recipe], ...]

    def shard(self, shard: Shard) -> ZooPlan:
        """The models of one shard: every n-th, so that neighbours of like size are spread."""
        return ZooPlan(self.output, self.settings, self.models[shard.index - 1 :: shard.count])


def plan_zoo(sources: Sequence[str], *, recipe: str | None = None, **options: Any) -> ZooPlan:
    """The plan of one zoo file, or of checkpoints and globs that share one recipe file.

    Args:
        recipe: YAML with the shared options; with a zoo file they come under its `defaults`.
        options: fields of `ZooFile` that win over the file's; None leaves one as it is.

    Raises:
        RecipeError: one line that names every fault: of the zoo file, of every model, of missing checkpoints.
    """
    shared = read_recipe(recipe) if recipe else {}
    given = {name: value for name, value in options.items() if value is not None}
    if len(sources) == 1 and Path(sources[0]).suffix.lower() in (".yaml", ".yml"):
        source = sources[0]
        content = read_recipe(source)
        if isinstance(content.get("defaults"), dict):
            content["defaults"] = {**shared, **content["defaults"]}
        elif shared and "defaults" not in content:
            content["defaults"] = shared
    else:
        source, content = "zoo", {"models": list(sources), "defaults": shared}
    settings = make_settings({**content, **given}, source)
    faults: list[str] = []
    models: list[tuple[str, Recipe]] = []
    for number, entry in enumerate(settings.models, 1):
        for options_of_one in expand(entry, settings.defaults, f"model {number}", faults):
            name = str(options_of_one.pop("name", None) or model_name(str(options_of_one["checkpoint"])))
            model = make_model(name, options_of_one, settings.output, faults)
            if model is not None:
                models.append((name, model))
    models = with_unique_names(models, settings.output, faults)
    if faults:
        raise RecipeError(f"{source}: {'; '.join(faults)}.")
    return ZooPlan(Path(settings.output), settings, tuple(models))


def make_settings(content: Mapping[str, Any], source: str) -> ZooFile:
    """The zoo file's own fields. Raises RecipeError naming all faults."""
    try:
        return ZooFile(**content)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            place = ".".join(str(part) for part in fault["loc"][:2])
            known = fault["type"] == "extra_forbidden"
            reason = "unknown field" if known else fault["msg"].removeprefix("Value error, ")
            line = f"{place}: {reason[:1].lower()}{reason[1:]}"
            if line not in faults:
                faults.append(line)
        raise RecipeError(f"{source}: {'; '.join(faults)}.") from None


def expand(
    entry: Mapping[str, Any] | str, defaults: Mapping[str, Any], place: str, faults: list[str]
) -> list[dict[str, Any]]:
    """Options of the models that one entry stands for; a fault is noted."""
    options = {"checkpoint": entry} if isinstance(entry, str) else dict(entry)
    merged = {str(name).replace("-", "_"): value for name, value in {**defaults, **options}.items()}
    pattern = merged.get("checkpoint")
    if not isinstance(pattern, str) or not pattern or "\0" in pattern:
        faults.append(f"{place}: a checkpoint was expected, got {pattern!r}")
        return []
    if Path(pattern).is_file():
        return [merged]
    if not PATTERN.search(pattern):
        faults.append(f"{place}: there is no file {pattern!r}")
        return []
    files = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not files:
        faults.append(f"{place}: no file matches {pattern!r}")
    if merged.get("name") is not None and len(files) > 1:
        faults.append(f"{place}: one name for the {len(files)} files that match {pattern!r}")
        return []
    return [{**merged, "checkpoint": path} for path in files]


def make_model(name: str, options: dict[str, Any], output: str, faults: list[str]) -> Recipe | None:
    """The recipe of one model, or None and a fault noted."""
    if not NAME.fullmatch(name):
        faults.append(f"{name!r}: a name has letters, digits, '_', '.', '+' and '-', at most 100 of them")
        return None
    for option in OWN_FIELDS:
        if options.pop(option, None) is not None:
            faults.append(f"{name}: {option} is the zoo's own")
    try:
        return make_recipe({**options, "output": str(Path(output, MODELS, name)), "force": True}, name)
    except RecipeError as error:
        faults.append(str(error).removesuffix("."))
        return None


def model_name(checkpoint: str) -> str:
    """A name for a checkpoint without one: its file's, with other characters replaced."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", Path(checkpoint).stem).lstrip(".-+")[:100] or "model"


def with_unique_names(models: list[tuple[str, Recipe]], output: str, faults: list[str]) -> list[tuple[str, Recipe]]:
    """Files of one name in several folders are told apart by their folders; other equal names are a fault."""
    counts: dict[str, int] = {}
    for name, _ in models:
        counts[name] = counts.get(name, 0) + 1
    renamed = []
    for name, recipe in models:
        if counts[name] > 1 and name == model_name(recipe.checkpoint):
            name = model_name(f"{Path(recipe.checkpoint).parent.name}-{Path(recipe.checkpoint).name}")
            recipe = recipe.model_copy(update={"output": str(Path(output, MODELS, name))})
        renamed.append((name, recipe))
    taken: set[str] = set()
    for name, _ in renamed:
        if name.lower() in taken:  # some file systems do not tell cases apart
            faults.append(f"{name}: two models of this name; give each a name")
        taken.add(name.lower())
    return renamed
