"""What prune, inspect and finetune do with a module that a program hands them: a copy, opened as a network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint.architecture import Architecture
from compress.checkpoint.parametrisations import materialise
from compress.checkpoint.reading.read import Checkpoint
from compress.checkpoint.unwrapping import unwrap
from compress.copying import deep_copy
from compress.data import overlap
from compress.data.calls import gather, parameters_of, spread
from compress.data.importing import describe_fault
from compress.data.live import LISTED, LiveSource, collect_batches
from compress.digests import hash_tensors
from compress.errors import CheckpointError, DataError, RecipeError, UnsupportedError
from compress.preparation import Guard, Opened, Prepared, check_answered, check_device, prepare_network
from compress.progress import LineProgress, Progress, SilentProgress
from compress.recipe import IN_MEMORY, Recipe, make_recipe


def live_recipe(plain: nn.Module, test: Any, options: Mapping[str, Any], command: str, **further: Any) -> Recipe:
    """The recipe of options that a program gave as keywords; those that are None are left at their default."""
    given = {name: names_of(name, value) if name in ("layer", "exclude") else value for name, value in options.items()}
    named = {"checkpoint": IN_MEMORY, "data": IN_MEMORY, "device": str(device_of(plain)), **further}
    if test is not None:
        named["eval"] = IN_MEMORY
    return make_recipe({**named, **{name: value for name, value in given.items() if value is not None}}, command)


def prepare_live(
    model: nn.Module,
    data: Any,
    test: Any,
    options: Mapping[str, Any],
    progress: Progress,
    command: str,
    guards: Mapping[str, Any] | None = None,
    **further: Any,
) -> tuple[Prepared, Recipe]:
    """A user's module traced on its data, and the recipe of its options. Raises CompressError, ValueError."""
    plain = unwrap(model)
    if guards:
        further["guard"] = tuple(f"{name}={IN_MEMORY}" for name in guards)
    recipe = live_recipe(plain, test, options, command, **further)
    torch.manual_seed(recipe.seed)
    progress.stage("reading samples")
    opened, sources = open_live(plain, data, test, recipe)
    opened_guards = [
        Guard(name, collect_batches(batches, opened.module, limit=2**62, name=name), recipe.guard_most(name))
        for name, batches in (guards or {}).items()
    ]
    strange = [guard.name for guard in opened_guards if guard.source.call != sources[0].call]  # type: ignore[attr-defined]
    if strange:
        raise DataError(f"`guards`: {strange[0]} gives other inputs than `data`; every batch must look alike.")
    doubt = doubt_answers(sources[0], opened.module)
    try:
        prepared = prepare_network(recipe, opened, None, sources, progress, opened_guards)
    except (CheckpointError, DataError) as error:
        hints = [doubt, LISTED if has_lists(sources[0]) else ""]
        raise type(error)(" ".join([str(error).rstrip(".:") + ".", *filter(None, hints)])) from error
    if doubt and not prepared.network.answered:
        progress.note(doubt)
    return prepared, recipe


def has_lists(source: LiveSource) -> bool:
    """Whether one of the network's arguments is a list of tensors."""
    args, _ = source.call.arguments(range(source.call.count))
    return any(isinstance(argument, (list, tuple)) for argument in args)


def doubt_answers(source: LiveSource, module: nn.Module) -> str:
    """That the last part of every batch was taken for labels or targets, where it may be an input; "" where not."""
    if not source.answered_last:
        return ""
    parameters, given = parameters_of(module), len(source.call.arguments(range(source.call.count))[0])
    name = parameters[given].name if given < len(parameters) else None
    what = f"forward()'s `{name}`" if name else "an input"
    return f"The last part of each batch was taken for labels or targets; if it is {what}, give mappings by its name."


def open_live(
    plain: nn.Module, data: Any, test: Any, recipe: Recipe
) -> tuple[Opened, tuple[LiveSource, LiveSource | None, int]]:
    """A copy of the module as an opened network, and its data. Raises CompressError."""
    module = copy_module(plain)
    calibration = collect_batches(data, module, limit=recipe.calibration_samples, name="data")
    evaluation = None if test is None else collect_batches(test, module, limit=2**62, name="test")
    if evaluation is not None and evaluation.call != calibration.call:
        raise DataError("`test` gives other inputs than `data`; every batch must look alike.")
    common = 0 if evaluation is None else overlap(calibration, evaluation)
    if common and recipe.max_drop is not None and not recipe.own_metric:
        raise DataError(f"{common} samples of `test` are in `data` too; a bound is certified only on disjoint samples.")
    check_answered(recipe, evaluation)
    return open_module(plain, module, calibration), (calibration, evaluation, common)


def copy_module(plain: nn.Module) -> nn.Module:
    """A copy in eval mode, half precision as float32. Raises CheckpointError, UnsupportedError."""
    try:
        module = deep_copy(plain).eval()
    except Exception as error:  # whatever the user's classes raise
        raise UnsupportedError(
            f"The module cannot be copied, so that it would have to be changed: {describe_fault(error)}."
        ) from error
    if any(nn.parameter.is_lazy(tensor) for tensor in module.parameters()):
        raise CheckpointError("The module has parameters without a shape yet; run it on a batch once before.")
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in module.state_dict().values()):
        module = module.float()
    return module


def open_module(plain: nn.Module, module: nn.Module, source: LiveSource) -> Opened:
    """The copy `module` of a user's `plain` one as an opened network, called as the source calls it."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in plain.state_dict().items() if is_tensor(tensor)}
    kind = type(plain)
    architecture = Architecture(f"{kind.__module__}:{kind.__qualname__}", {}, how=IN_MEMORY, trusted=True)
    kinds = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    checkpoint = Checkpoint(
        state=state,
        module=None,
        path=Path(kind.__qualname__),
        sha256=hash_tensors(state),
        format=IN_MEMORY,
        state_key=None,
        prefix="",
        dtype=max(set(kinds), key=kinds.count) if kinds else torch.float32,
        bytes=sum(tensor.nbytes for tensor in state.values()),
    )
    materialise(module)
    return Opened(checkpoint, architecture, spread(module, source.call))


def device_of(module: nn.Module) -> torch.device:
    """Where all the module's tensors are. Raises CheckpointError: on several devices; RecipeError: on a strange one."""
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(devices) > 1:
        raise CheckpointError(f"The module lies on {', '.join(sorted(map(str, devices)))}; move it to one device.")
    if torch.device("meta") in devices:
        raise CheckpointError("The module lies on the meta device: it has no numbers yet; load its weights first.")
    return check_device(str(next(iter(devices), torch.device("cpu"))))


def dress_like(plain: nn.Module) -> Callable[[nn.Module], nn.Module]:
    """What makes a network of ours what the user gave: of the same class, tensors in the same dtypes.

    A tensor that the user's network has not, such as a bias that a batch norm was folded into, takes that of the layer
    that it stands in.
    """
    dtypes = {name: tensor.dtype for name, tensor in plain.state_dict().items() if is_tensor(tensor)}

    def dress(module: nn.Module) -> nn.Module:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            dtype = dtypes.get(name) or dtype_around(name, dtypes)
            if dtype is not None and (name in dtypes or tensor.is_floating_point()):
                tensor.data = tensor.data.to(dtype)
        return gather(module)

    return dress


def dtype_around(name: str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """The floating dtype that most tensors have beside `name`, in its module or the nearest one around it."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        beside = [
            dtype for known, dtype in dtypes.items() if known.rpartition(".")[0] == path and dtype.is_floating_point
        ]
        if beside:
            return max(beside, key=beside.count)
    return None


def choose_progress(progress: Progress | bool | None) -> Progress:
    """The user's own, a line on stderr, or nothing; by default a line where somebody is looking."""
    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    if isinstance(progress, bool):
        return LineProgress() if progress else SilentProgress()
    return progress


def is_tensor(value: object) -> bool:
    """Whether an entry of a state dict is a tensor; modules may put other things there."""
    return isinstance(value, Tensor)


def names_of(option: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several as a tuple.

    Raises:
        RecipeError: it is neither.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise RecipeError(f"{option}: expected the name of a layer or several names, got {value!r}.")
    return tuple(value)
