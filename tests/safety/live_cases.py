"""Random live modules × random batches, measures and options through `compress.prune`: cases of the same fuzz.

A case follows from its seed alone. What is wrong: any exception that is not a `CompressError` of one line, a module
that was changed, a result that does not run on the batch it was made from or that is not finite where the original is.
"""

from __future__ import annotations

import copy
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import compress
from compress.errors import CompressError
from tests.safety.network_cases import design


class Two(nn.Module):
    """Two tensors in, joined after a layer each; the second may be left out where `optional`."""

    def __init__(self, first: int, second: int, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(first, width), nn.Linear(second, width)
        self.joined, self.head = nn.Linear(2 * width, width), nn.Linear(width, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        both = torch.cat([torch.relu(self.left(left)), torch.relu(self.right(right))], -1)
        scores: Tensor = self.head(torch.relu(self.joined(both)))
        return scores


class Nested(nn.Module):
    """A mapping in, a mapping out."""

    def __init__(self, first: int, second: int, width: int) -> None:
        super().__init__()
        self.inner = Two(first, second, width)

    def forward(self, batch: dict[str, Tensor], scale: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.inner(batch["left"], batch["right"])
        return {"scores": scores if scale is None else scores * scale, "sum": scores.sum(-1)}


FAULTS = (
    *["none"] * 38, "empty", "lengths", "shape", "nan", "text", "nothing",
    "number", "generator", "meta", "integers", "double", "one sample", "constant", "not iterable", "raises", "huge",
    "batch of none", "labels wrong", "too many",
)  # fmt: skip
STATES = (*["eval"] * 8, "train", "frozen", "parallel", "compiled", "half", "double", "hooked", "meta")
MEASURES = (
    *["off", "number", "mapping"] * 4,
    "number",
    "tensor",
    "mapping",
    "raises",
    "nan",
    "text",
    "nothing",
    "changes",
    "random",
)
OPTIONS: tuple[dict[str, Any], ...] = (
    *({"keep": 0.5}, {"macs": 0.5}, {"macs": 0.7}, {}, {"params": 0.5}, {"error": 0.1}) * 8,
    {"macs": 0.4, "recover": "off"},
    {"keep": 0.5}, {"keep": 0.5}, {"keep": 2}, {"keep": "50%"}, {"macs": 0.5}, {"macs": 0.7}, {"macs": "60%"}, {},
    {"params": 0.5}, {"error": 0}, {"error": 0.3}, {"macs": 0.0001}, {"macs": 0}, {"keep": -1},
    {"layer": "nope", "keep": 0.5},
    {"keep": 0.5, "batch_size": 0}, {"keep": 0.5, "unknown": 3}, {"max_drop": 1.0}, {"macs": 0.5, "max_drop": 0.5},
    {"keep": 0.5, "couple": True}, {"keep": 0.5, "calibration_samples": 5}, {"keep": 0.5, "seed": -3}, {"keep": "half"},
    {"macs": 0.5, "recover": "off"}, {"keep": 0.5, "layer": 7}, {"macs": float("nan")}, {"keep": True},
    {"latency": 0.9}, {"keep": 0.5, "round_to": 4}, {"keep": 0.5, "output": "somewhere"}, {"macs": "0.5x"},
)  # fmt: skip


@dataclass(frozen=True)
class LiveCase:
    """What is handed to `prune`, and how the case is called in a fault."""

    said: str
    model: nn.Module
    batches: Any
    sample: Any
    options: dict[str, Any]


def make_live_case(seed: int) -> LiveCase:
    """The case of that number."""
    draw = random.Random(f"live {seed}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = draw.choice(("design", "design", "two", "nested"))
        if kind == "design":
            model, shape, inputs = design(seed)
            make: Callable[[int], Any] = (
                (lambda n: torch.randint(0, 11, (n, *shape)))
                if inputs == "tokens"
                else (lambda n: torch.randn(n, *shape))
            )
        else:
            first, second = draw.choice((1, 3, 6)), draw.choice((2, 4))
            model = (Two if kind == "two" else Nested)(first, second, draw.choice((1, 4, 8))).eval()
            make = lambda n: {"left": torch.randn(n, first), "right": torch.randn(n, second)}  # noqa: E731
        fault, state, measure = draw.choice(FAULTS), draw.choice(STATES), draw.choice(MEASURES)
        form = draw.choice(("plain", "labelled", "mapping"))
        rows = [put(make(20), form, kind, draw) for _ in range(4)]
        sample = make(20)
        options = {**draw.choice(OPTIONS)}
        if measure != "off":
            options["evaluate"] = make_measure(measure)
        batches = damage(rows, fault)
        model = change(model, state)
    return LiveCase(
        f"live seed {seed}: {kind}, {form}, {fault}, {state}, {measure}, {options}", model, batches, sample, options
    )


def put(inputs: Any, form: str, kind: str, draw: random.Random) -> Any:
    """A batch as loaders give them."""
    labels = torch.randint(0, 2, (20,))
    if kind == "design":
        return {"plain": inputs, "labelled": (inputs, labels), "mapping": {"inputs": inputs, "labels": labels}}[form]
    if kind == "nested":
        return (
            inputs
            if form == "plain"
            else (inputs, labels)
            if form == "labelled"
            else {"batch": inputs, "label": labels}
        )
    pair = (inputs["left"], inputs["right"])
    return pair if form == "plain" else (pair, labels) if form == "labelled" else {**inputs, "labels": labels}


def each_tensor(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """The batch with every tensor changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {name: each_tensor(value, change) for name, value in batch.items()}
    return type(batch)(each_tensor(value, change) for value in batch)


def as_tuple(row: Any) -> tuple[Any, ...]:
    """The batch as a tuple."""
    return row if isinstance(row, tuple) else (row,)


def damage(rows: list[Any], fault: str) -> Any:
    """The iterable of a case."""

    def poisoned(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if tensor.is_floating_point():
            tensor.view(-1)[0] = float("nan")
        return tensor

    def raising() -> Iterator[Any]:
        yield rows[0]
        raise RuntimeError("the disk is gone\nand the loader with it")

    whole: dict[str, Callable[[], Any]] = {
        "empty": list, "text": lambda: "batches", "nothing": lambda: None, "number": lambda: 3,
        "generator": lambda: iter(rows), "not iterable": object, "raises": raising,
        "batch of none": lambda: [None, None],
        "lengths": lambda: [rows[0], each_tensor(rows[1], lambda t: t[:7]), rows[2]],
        "one sample": lambda: [each_tensor(rows[0], lambda t: t[:1])],
        "too many": lambda: [(*as_tuple(row), torch.zeros(20), torch.ones(20)) for row in rows],
    }  # fmt: skip
    if fault in whole:
        return whole[fault]()
    every: dict[str, Callable[[Tensor], Any]] = {
        "shape": lambda t: torch.cat([t, t], -1), "nan": poisoned, "meta": lambda t: t.to("meta"),
        "integers": lambda t: t.long(), "double": lambda t: t.double() if t.is_floating_point() else t,
        "constant": lambda t: t[:1].expand_as(t), "huge": lambda t: t * 1e18 if t.is_floating_point() else t,
        "labels wrong": lambda t: t - 5 if t.ndim == 1 else t,
    }  # fmt: skip
    return [each_tensor(row, every[fault]) for row in rows] if fault in every else rows


def make_measure(kind: str) -> Callable[[nn.Module], Any]:
    """A user's measure, sound or not."""

    def measure(model: nn.Module) -> Any:
        size = float(sum(p.numel() for p in model.parameters()))
        if kind == "raises":
            raise KeyError("no such image")
        if kind == "changes":
            for parameter in model.parameters():
                parameter.data.zero_()
        return {
            "number": size, "tensor": torch.tensor(size), "mapping": {"size": size, "half": size / 2},
            "nan": float("nan"), "text": "good", "nothing": None, "changes": 1.0, "random": random.random(),
        }[kind]  # fmt: skip

    return measure


def change(model: nn.Module, state: str) -> nn.Module:
    """The module as people hold it."""

    def hook(*_: Any) -> None:
        return None

    if state == "train":
        return model.train()
    if state == "frozen":
        return model.requires_grad_(False)
    if state == "parallel":
        return nn.DataParallel(model)
    if state == "compiled":
        return torch.compile(model)  # type: ignore[return-value]
    if state == "half":
        return model.half()
    if state == "double":
        return model.double()
    if state == "meta":
        return model.to("meta")
    if state == "hooked":
        next(iter(model.children())).register_forward_hook(hook)
    return model


def meet_live(case: LiveCase) -> tuple[str, str | None]:
    """The outcome ("done" or the name of the refusal) and what is wrong with it; None: nothing."""
    before = copy.deepcopy(case.model.state_dict())
    modes = [module.training for module in case.model.modules()]
    try:
        result = compress.prune(case.model, case.batches, progress=False, **case.options)
    except CompressError as refusal:
        fault = None if len(str(refusal).strip().splitlines()) == 1 else f"{case.said}\nnot one line: {refusal}"
        return type(refusal).__name__, fault or changed(case, before, modes)
    except BaseException:
        return "uncaught", f"{case.said}\n{traceback.format_exc(limit=-4)}"
    fault = changed(case, before, modes)
    if fault:
        return "done", fault
    try:
        with torch.no_grad():
            values = (
                result.model(*case.sample.values()) if isinstance(unwrapped(case), Two) else result.model(case.sample)
            )
        sound = all(tensor.isfinite().all() for tensor in leaves(values))
        with torch.no_grad():
            own = unwrapped(case).eval()
            was = own(*case.sample.values()) if isinstance(own, Two) else own(case.sample)
        if not sound and all(tensor.isfinite().all() for tensor in leaves(was)):
            return "done", f"{case.said}\nthe result is not finite where the original is"
        str(result.report), repr(result)
    except Exception:
        if next(unwrapped(case).parameters()).dtype == torch.float32:
            return "done", f"{case.said}\n{traceback.format_exc(limit=-4)}"
    return "done", None


def unwrapped(case: LiveCase) -> nn.Module:
    """The module behind wrappers."""
    inner = getattr(case.model, "_orig_mod", case.model)
    return inner.module if isinstance(inner, nn.DataParallel) else inner


def changed(case: LiveCase, before: dict[str, Tensor], modes: list[bool]) -> str | None:
    """What a call changed in the module that it was given."""
    after = case.model.state_dict()
    same = before.keys() == after.keys() and all(
        value.is_meta or torch.equal(value.nan_to_num(), after[name].nan_to_num()) for name, value in before.items()
    )
    if not same or modes != [module.training for module in case.model.modules()]:
        return f"{case.said}\nthe module that was given is changed"
    return None


def leaves(values: Any) -> list[Tensor]:
    """All tensors of an output."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [leaf for value in values or () for leaf in leaves(value)] if isinstance(values, (list, tuple)) else []
