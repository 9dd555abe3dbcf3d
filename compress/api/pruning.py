"""Compressing a network that a program holds: module, data and measure in memory, nothing on disk unless asked."""

from __future__ import annotations

import copy
import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.api.running import Work, compress_prepared, raise_failed_gates, report_work, write_run
from compress.atomic import reserved
from compress.checkpoint.architecture import Architecture
from compress.checkpoint.parametrisations import materialise
from compress.checkpoint.read import Checkpoint
from compress.data import DataSource, overlap
from compress.data.calls import gather, spread
from compress.data.importing import describe_fault
from compress.data.live import collect_batches
from compress.errors import CheckpointError, CompressError, DataError, GateError, UnsupportedError
from compress.preparation import Opened, check_device, prepare_network
from compress.progress import LineProgress, Progress, SilentProgress, Stages
from compress.recipe import Recipe, make_recipe
from compress.report.model import Measured, RunReport

Measure = Callable[[nn.Module], "float | Mapping[str, float]"]
IN_MEMORY = "in memory"


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A network compressed in memory.

    Attributes:
        model: of the class of the network that was given, with smaller tensors, eval mode, on its device.
        report: everything that was decided and measured.
        metrics: name -> (before, after), of what `evaluate` said.
    """

    model: nn.Module
    report: RunReport
    metrics: Mapping[str, tuple[float, float]]
    _work: Work
    _recipe: Recipe
    _original: nn.Module

    def save(self, folder: str | Path, *, force: bool = False, progress: Progress | None = None) -> Path:
        """Write the network with manifest and report; it reloads with `compress.load(folder, model=MyNet())`.

        Where the network's class can be imported and built without arguments, `compress.load(folder, trust_code=True)`
        builds it too. Nothing is pickled.

        Raises:
            OutputError: the folder exists and is not ours, or cannot be written; nothing is left.
        """
        recipe = self._recipe.model_copy(update={"output": str(folder), "force": force})
        with reserved(Path(folder), force=force):
            shown = progress or SilentProgress()
            write_run(Path(folder), recipe, self._work, self.report, Stages(), shown, original=self._original)
        return Path(folder)

    def __repr__(self) -> str:
        before, after = self.report.cost.parameters.before, self.report.cost.parameters.after
        said = "".join(f", {name} {one:.4g} → {two:.4g}" for name, (one, two) in self.metrics.items())
        return f"PruneResult({type(self.model).__name__}: {before:,} → {after:,} parameters{said})"

    def _repr_html_(self) -> str:
        """The report, as a notebook shows it."""
        from compress.report.html import render_report

        page = render_report(self.report).replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{page}" style="width:100%;height:36em;border:0" title="report"></iframe>'


def prune(
    model: nn.Module,
    data: Any,
    *,
    evaluate: Measure | None = None,
    higher_is_better: bool = True,
    test: Any = None,
    macs: float | str | None = None,
    params: float | str | None = None,
    latency: float | str | None = None,
    max_drop: float | None = None,
    keep: float | int | str | None = None,
    error: float | None = None,
    layer: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    couple: bool = False,
    round_to: int = 1,
    calibration_samples: int = 50_000,
    batch_size: int = 128,
    seed: int = 0,
    progress: Progress | bool | None = None,
    **options: Any,
) -> PruneResult:
    """Compress a module in memory; the module that is given is never changed.

        result = compress.prune(net, loader, macs=0.5, evaluate=accuracy)
        result.model                                     # the same class, smaller tensors
        result.save("net-half")                          # compress.load("net-half", model=Net())

    Args:
        model: any module that `torch.export` can trace; wrappers of `torch.compile` and `DataParallel` are taken off.
        data: an iterable of batches to calibrate on, as a DataLoader, a list or a generator gives them: what the model
            takes, alone or with labels or targets behind. At most `calibration_samples` are read and held in memory.
        evaluate: a network to a number, or to several by name; called once before and once after, with copies.
        higher_is_better: of the first number, where `max_drop` bounds how far it may worsen (in its own units).
        test: labelled batches disjoint from `data`, for the built-in figures.
        macs, params, latency, max_drop, keep, error, layer, exclude, couple, round_to, batch_size, seed: as the command
            line's options of these names.
        progress: True: a line on stderr, False: nothing, None: the line where a terminal or a notebook shows it; or a
            `Progress` of your own.
        options: any other option of a recipe, by its name.

    Raises:
        CompressError: what is wrong with the module, the data, the measure or the options, in one line.
        GateError: a budget or a bound is not kept.
    """
    shown = choose_progress(progress)
    plain = unwrap(model)
    judged_by_measure = evaluate is not None and max_drop is not None
    given: dict[str, Any] = {
        "macs": macs, "params": params, "latency": latency, "keep": keep, "error": error, "couple": couple,
        "round_to": round_to, "calibration_samples": calibration_samples, "batch_size": batch_size, "seed": seed,
        "layer": names_of(layer), "exclude": names_of(exclude), **options,
    }  # fmt: skip
    recipe = make_recipe(
        {
            "checkpoint": IN_MEMORY,
            "data": IN_MEMORY,
            "device": str(device_of(plain)),
            **({} if test is None else {"eval": IN_MEMORY}),
            **({} if max_drop is None or judged_by_measure else {"max_drop": max_drop}),
            **{name: value for name, value in given.items() if value is not None},
        },
        "prune",
    )
    clock = Stages()
    torch.manual_seed(recipe.seed)
    with clock("prepare"):
        shown.stage("reading samples")
        opened, sources = open_live(plain, data, test, recipe)
        prepared = prepare_network(recipe, opened, None, sources, shown)
    before = measure(evaluate, plain, "before") if evaluate is not None else {}
    work = compress_prepared(prepared, recipe, shown, clock)
    report = report_work(work, recipe, shown, clock)
    raise_failed_gates(report)
    network = gather(copy.deepcopy(work.cut.narrowed.module)).eval()
    after = measure(evaluate, network, "after") if evaluate is not None else {}
    if isinstance(shown, LineProgress):
        shown.close()
    metrics = {name: (value, after.get(name, math.nan)) for name, value in before.items()}
    report = replace(report, metrics={name: Measured(*pair) for name, pair in metrics.items()})
    if judged_by_measure and max_drop is not None:
        check_measure(metrics, max_drop, higher_is_better, report)
    return PruneResult(network, report, metrics, work, recipe, opened.module)


def open_live(
    plain: nn.Module, data: Any, test: Any, recipe: Recipe
) -> tuple[Opened, tuple[DataSource, DataSource | None, int]]:
    """A copy of the module as an opened network, and its data. Raises CompressError."""
    try:
        module = copy.deepcopy(plain).eval()
    except Exception as error:  # whatever the user's classes raise
        raise UnsupportedError(
            f"The module cannot be copied, so that it would have to be changed: {describe_fault(error)}."
        ) from error
    if any(nn.parameter.is_lazy(tensor) for tensor in module.parameters()):
        raise CheckpointError("The module has parameters without a shape yet; run it on a batch once before.")
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in module.state_dict().values()):
        module = module.float()
    state = {name: tensor.detach().cpu().clone() for name, tensor in plain.state_dict().items() if is_tensor(tensor)}
    calibration = collect_batches(data, module, limit=recipe.calibration_samples, name="data")
    evaluation = None if test is None else collect_batches(test, module, limit=2**62, name="test")
    if evaluation is not None and evaluation.call != calibration.call:
        raise DataError("`test` gives other inputs than `data`; every batch must look alike.")
    common = 0 if evaluation is None else overlap(calibration, evaluation)
    if common and recipe.max_drop is not None:
        raise DataError(f"{common} samples of `test` are in `data` too; a bound is certified only on disjoint samples.")
    kind = type(plain)
    architecture = Architecture(f"{kind.__module__}:{kind.__qualname__}", {}, how=IN_MEMORY, trusted=True)
    kinds = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    checkpoint = Checkpoint(
        state=state,
        module=None,
        path=Path(kind.__qualname__),
        sha256=hash_state(state),
        format=IN_MEMORY,
        state_key=None,
        prefix="",
        dtype=max(set(kinds), key=kinds.count) if kinds else torch.float32,
        bytes=sum(tensor.nbytes for tensor in state.values()),
    )
    materialise(module)
    return Opened(checkpoint, architecture, spread(module, calibration.call)), (calibration, evaluation, common)


def unwrap(model: Any) -> nn.Module:
    """The module without what `torch.compile` and data parallelism put around it. Raises UnsupportedError."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be an nn.Module, got {type(model).__module__}.{type(model).__qualname__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError("A TorchScript module has no class to rebuild; give the nn.Module it was made from.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    inner = getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def device_of(module: nn.Module) -> torch.device:
    """Where all the module's tensors are. Raises CheckpointError: on several devices; RecipeError: on a strange one."""
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(devices) > 1:
        raise CheckpointError(f"The module lies on {', '.join(sorted(map(str, devices)))}; move it to one device.")
    return check_device(str(next(iter(devices), torch.device("cpu"))))


def measure(evaluate: Measure, network: nn.Module, when: Literal["before", "after"]) -> dict[str, float]:
    """What the user's measure says of a copy of the network, by name.

    Raises:
        CompressError: it raises, or gives no finite number; the network is untouched.
    """
    own = copy.deepcopy(network).eval()
    try:
        with torch.no_grad():
            found = evaluate(own)
    except CompressError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise DataError(f"`evaluate` raised on the network {when} compression: {describe_fault(error)}.") from error
    named = dict(found) if isinstance(found, Mapping) else {"metric": found}
    numbers: dict[str, float] = {}
    for name, value in named.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise DataError(f"`evaluate` must give a number or a mapping of numbers; `{name}` is {kind}.") from error
        if not math.isfinite(numbers[str(name)]):
            raise DataError(f"`evaluate` gives {name} = {value} on the network {when} compression.")
    if not numbers:
        raise DataError("`evaluate` gave an empty mapping; at least one number was expected.")
    return numbers


def check_measure(
    metrics: Mapping[str, tuple[float, float]], max_drop: float, higher_is_better: bool, report: RunReport
) -> None:
    """Refuse a result whose first number worsened by more than allowed. Raises GateError with the report."""
    name, (before, after) = next(iter(metrics.items()))
    worse = before - after if higher_is_better else after - before
    if worse > max_drop + 1e-12:
        raise GateError(f"{name} worsened by {worse:.4g} ({before:.4g} → {after:.4g}), allowed {max_drop:g}.", report)


def choose_progress(progress: Progress | bool | None) -> Progress:
    """The user's own, a line on stderr, or nothing; by default a line where somebody is looking."""
    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    if isinstance(progress, bool):
        return LineProgress() if progress else SilentProgress()
    return progress


def hash_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and numbers, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_tensor(value: object) -> bool:
    """Whether an entry of a state dict is a tensor; modules may put other things there."""
    return isinstance(value, Tensor)


def names_of(value: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)
