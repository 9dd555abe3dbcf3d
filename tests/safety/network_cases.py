"""Random small networks, random data with random faults, and random commands on them: the cases of a fuzz.

A case follows from its seed alone. `build(seed)` is the architecture that a command line names, so a written folder can
be loaded again in another process.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.safety.fuzzing import EXIT_CODES, call

NAMES = (
    "first", "[red]x[/bold]", "a b", "ü", "weight", "0", "x_y-z", "__x", "conv1d", "Δ", ":smile:", "{task}", "%s", "$x",
    "forwards", "é" * 30, "in'quote", 'in"double', "back\\slash", "{}", "*", "[a-z]", "?", "<b>", "&amp;", "|pipe|",
)  # fmt: skip
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.ReLU, nn.ReLU, nn.ReLU6, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.LeakyReLU, nn.Hardswish, nn.ELU,
    nn.Identity, nn.PReLU, nn.Softplus,
)  # fmt: skip
SCALES = (1.0, 1.0, 1.0, 1.0, 1.0, 1e-3, 1e3, 1e-20, 1e12, 0.0)
OUTPUTS = ("scores", "scores", "scores", "one", "squeezed", "dense", "tuple", "list", "dict", "nested", "with None")


class Case(nn.Module):
    """A chain of layers with odd names, and whatever its outputs are made into."""

    def __init__(
        self, layers: list[tuple[str, nn.Module]], heads: nn.ModuleList, form: str, *, twice: str | None
    ) -> None:
        super().__init__()
        self.order = [name for name, _ in layers]
        for name, layer in layers:
            self.add_module(name, layer)
        self.heads = heads
        self.form, self.twice = form, twice

    def forward(self, inputs: Tensor, *further: Tensor) -> Any:
        hidden = inputs
        for other in further:
            hidden = hidden + other
        for name in self.order:
            layer = self.get_submodule_(name)
            hidden = hidden + layer(hidden) if name == self.twice else layer(hidden)
        found = [head(hidden) for head in self.heads]
        if self.form == "squeezed":
            return found[0].squeeze(-1)
        if self.form == "tuple":
            return tuple(found)
        if self.form == "list":
            return found
        if self.form == "dict":
            return {f"out {k}": one for k, one in enumerate(found)}
        if self.form == "nested":
            return {"first": found[0], "rest": (found[1], [found[2]])}
        if self.form == "with None":
            return found[0], None
        return found[0]

    def get_submodule_(self, name: str) -> nn.Module:
        """The layer of that name, whatever characters it has."""
        found: nn.Module = self._modules[name]  # type: ignore[assignment]
        return found


def build(seed: int) -> nn.Module:
    """The network of a case, eval mode."""
    return design(seed)[0]


def design(seed: int) -> tuple[nn.Module, tuple[int, ...], str]:
    """The network of a case, the shape of a sample, and its inputs' kind: "real", "images" or "tokens"."""
    draw = random.Random(f"network {seed}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module, shape, kind = (draw.choice((chain, chain, convolutions, signals, tokens)))(draw)
        disturb(module, draw)
    return module.eval(), shape, kind


def widths(draw: random.Random, count: int) -> list[int]:
    """Layer widths, some of them one."""
    return [draw.choice((1, 2, 3, 5, 8, 12)) for _ in range(count)]


def named(layers: list[nn.Module], draw: random.Random) -> list[tuple[str, nn.Module]]:
    """The layers under different odd names; module names may hold no dot."""
    if draw.random() < 0.5:
        return [(f"layer{place}", layer) for place, layer in enumerate(layers)]
    names = draw.sample(NAMES, min(len(layers), len(NAMES)))
    rest = [f"more{k}" for k in range(len(layers) - len(names))]
    return [
        (f"{name}_" if hasattr(nn.Module, name) or name in ("heads", "order", "form", "twice") else name, layer)
        for name, layer in zip(names + rest, layers, strict=True)
    ]


def finish(layers: list[nn.Module], size: int, draw: random.Random, head: Callable[[int, int], nn.Module]) -> nn.Module:
    """Heads on top of layers that end in `size` features."""
    form = draw.choice(OUTPUTS)
    wide = 1 if form in ("one", "squeezed") else draw.choice((2, 3, 5))
    heads = nn.ModuleList([head(size, wide if k == 0 else draw.choice((1, 2, 4))) for k in range(3)])
    return Case(named(layers, draw), heads, form, twice=None)


def chain(draw: random.Random) -> tuple[nn.Module, tuple[int, ...], str]:
    """Linear layers, perhaps with norms, dropout, a shortcut or a layer used twice."""
    size = start = draw.choice((1, 3, 6))
    layers: list[nn.Module] = []
    for width in widths(draw, draw.choice((1, 2, 2, 3))):
        layers += [nn.Linear(size, width, bias=draw.random() < 0.7), draw.choice(ACTIVATIONS)()]
        if draw.random() < 0.2:
            layers.append(draw.choice((nn.BatchNorm1d, nn.LayerNorm))(width))
        if draw.random() < 0.2:
            layers.append(nn.Dropout(0.5))
        size = width
    if draw.random() < 0.3:
        shared = nn.Linear(size, size)
        layers += [shared, nn.ReLU(), shared] if draw.random() < 0.5 else [Shortcut(shared)]
    return finish(layers, size, draw, nn.Linear), (start,), "real"


class Shortcut(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.relu(self.inner(inputs))


def convolutions(draw: random.Random) -> tuple[nn.Module, tuple[int, ...], str]:
    """2-d convolutions over images, a pooled or a dense head."""
    channels = start = draw.choice((1, 3))
    side = draw.choice((4, 6))
    layers: list[nn.Module] = []
    for width in widths(draw, draw.choice((1, 2, 3))):
        kernel = draw.choice((1, 3))
        layers.append(nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=draw.random() < 0.6))
        if draw.random() < 0.4:
            layers.append(nn.BatchNorm2d(width))
        layers.append(draw.choice(ACTIVATIONS)())
        if draw.random() < 0.2:
            layers.append(nn.Conv2d(width, width, 3, padding=1, groups=width))
        channels = width
    if draw.random() < 0.3:
        module = Case(
            named(layers, draw), nn.ModuleList([nn.Conv2d(channels, draw.choice((1, 3)), 1)]), "dense", twice=None
        )
        return module, (start, side, side), "images"
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return finish(layers, channels, draw, nn.Linear), (start, side, side), "images"


def signals(draw: random.Random) -> tuple[nn.Module, tuple[int, ...], str]:
    """1-d convolutions."""
    layers: list[nn.Module] = []
    channels = 2
    for width in widths(draw, 2):
        layers += [nn.Conv1d(channels, width, 3, padding=1), draw.choice(ACTIVATIONS)()]
        channels = width
    layers += [nn.AdaptiveMaxPool1d(1), nn.Flatten()]
    return finish(layers, channels, draw, nn.Linear), (2, 7), "real"


def tokens(draw: random.Random) -> tuple[nn.Module, tuple[int, ...], str]:
    """An embedding, layers on every position, a head on each or on their mean."""
    size = draw.choice((2, 4))
    layers: list[nn.Module] = [nn.Embedding(11, size)]
    for width in widths(draw, 2):
        layers += [nn.Linear(size, width), draw.choice(ACTIVATIONS)()]
        size = width
    if draw.random() < 0.5:
        layers.append(Mean())
    return finish(layers, size, draw, nn.Linear), (5,), "tokens"


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(1)


def disturb(module: nn.Module, draw: random.Random) -> None:
    """Scales, dead, saturated and equal units, constant channels."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if draw.random() < 0.15:
                parameter.mul_(draw.choice(SCALES))
            if draw.random() < 0.1 and parameter.ndim >= 1 and "bias" in name:
                parameter[: len(parameter) // 2 + 1] = draw.choice((-100.0, 100.0, 0.0))
            if draw.random() < 0.1 and parameter.ndim >= 2:
                parameter[-1] = draw.choice((0.0, 2.0)) * parameter[0]
        for buffer in module.buffers():
            if draw.random() < 0.1 and buffer.is_floating_point():
                buffer.mul_(draw.choice((0.0, 1e-12, 1e6)))


FAULTS = (
    "none", "none", "none", "none", "none", "none", "none", "few", "two", "constant", "constant feature", "nan", "inf",
    "huge", "tiny", "shape", "more dimensions", "integers", "double", "half", "empty", "copies", "labels wrong",
    "labels float", "labels negative", "labels short", "no labels", "targets", "targets wrong", "other names", "text",
    "absent", "tokens out of range", "objects", "images",
)  # fmt: skip


def write_data(path: Path, shape: tuple[int, ...], kind: str, fault: str, draw: random.Random, count: int = 60) -> str:
    """Data of a network with one fault; the spec that names them."""
    numbers = np.random.default_rng(draw.randrange(1 << 30))
    count = {"few": 9, "two": 2, "empty": 0}.get(fault, count)
    inputs: np.ndarray = numbers.normal(size=(count, *shape)).astype("f4")
    if kind == "tokens":
        inputs = numbers.integers(0, 11, (count, *shape))
    labels: np.ndarray | None = numbers.integers(0, 2, count)
    if not fault.startswith("labels") and draw.random() < 0.6:
        labels = None
    arrays: dict[str, np.ndarray] = {}
    if fault == "constant":
        inputs[:] = inputs[:1]
    elif fault == "constant feature":
        inputs[:, 0] = 1
    elif fault in ("nan", "inf") and kind != "tokens":
        inputs.reshape(-1)[inputs.size // 2] = np.nan if fault == "nan" else np.inf
    elif fault in ("huge", "tiny") and kind != "tokens":
        inputs *= 1e18 if fault == "huge" else 1e-18
    elif fault == "shape":
        inputs = np.concatenate([inputs, inputs], -1)
    elif fault == "more dimensions":
        inputs = inputs[..., None]
    elif fault == "integers":
        inputs = inputs.astype(np.int64)
    elif fault in ("double", "half"):
        inputs = inputs.astype(np.float64 if fault == "double" else np.float16)
    elif fault == "copies" and count:
        inputs = inputs[numbers.integers(0, 5, count)]
    elif fault == "labels wrong":
        labels = numbers.integers(0, 99, count)
    elif fault == "labels float":
        labels = numbers.integers(0, 2, count) + 0.5
    elif fault == "labels negative":
        labels = numbers.integers(0, 2, count) - 1
    elif fault == "labels short":
        labels = numbers.integers(0, 2, count + 1)
    elif fault in ("targets", "targets wrong"):
        labels = None
        arrays["targets"] = numbers.normal(size=(count, draw.choice((1, 2, 3)) if fault == "targets" else 7)).astype(
            "f4"
        )
    elif fault == "tokens out of range":
        inputs = numbers.integers(0, 1000, (count, *shape))
    elif fault == "images" and len(shape) == 3:
        arrays["images"] = numbers.integers(0, 255, (count, *shape[1:], shape[0])).astype("u1")
    if fault != "no labels" and labels is not None:
        arrays["labels"] = labels
    if "images" not in arrays:
        arrays["inputs"] = inputs
    if fault == "other names":
        arrays = {"x": inputs, "y": np.zeros(count)}
    if fault == "objects":
        arrays["inputs"] = np.array([None] * max(count, 1), dtype=object)
    if fault == "text":
        path.write_text("no data")
    elif fault != "absent":
        draw.choice((np.savez, np.savez_compressed))(path, **arrays)
    return draw.choice(("npz:", "")) + str(path)


WIDTHS = (
    ["--keep", "0.5"], ["--keep", "1"], ["--keep", "50%"], ["--keep", "2"], ["--error", "0"], ["--error", "0.3"], [],
    ["--penalty", "0.1"], ["--macs", "0.5"], ["--params", "50%"], ["--macs", "0.01"], ["--max-drop", "10"],
    ["--macs", "0.6", "--max-drop", "50"], ["--merge-aligned"], ["--keep", "1.0"], ["--keep", "1e9"],
    ["--tolerance", "0.9"],
)  # fmt: skip
EXTRAS = (
    [], [], [], [], [], [], ["--couple"], ["--allow-bias"], ["--round-to", "2"], ["--round-to", "1000"],
    ["--memory", "1K"],
    ["--selection", "magnitude"], ["--selection", "pivoted"], ["--selection", "lasso"], ["--calibration-samples", "10"],
    ["--solver", "proximal"], ["--unit-costs", "feature"], ["--batch-size", "1"], ["--held-back", "0.5"],
    ["--layer", "layer0"], ["--layer", "[a-z]"], ["--exclude", "*"], ["--min-reduction", "1.1x"], ["--recover", "2"],
    ["--ridge", "0"], ["--export", "pt2"], ["--refine", "0"], ["--finetune", "sgd", "--epochs", "1"],
)  # fmt: skip


TRAINING = (
    [], [], [], ["--method", "pathprox"], ["--method", "lasso"], ["--method", "group_lasso"], ["--method", "l1"],
    ["--lr", "1e6"], ["--lr", "0"], ["--penalty", "1e9"], ["--momentum", "0.9", "--nesterov"],
    ["--nesterov", "--momentum", "0"],
    ["--schedule", "milestones", "--milestones", "1,3"], ["--milestones", "x"], ["--clip-norm", "0.1"],
    ["--warmup", "9"],
    ["--flip"], ["--train-crop", "2"], ["--train-held-back", "0.3", "--patience", "1"],
    ["--train-held-back", "0.99"],
    ["--half"], ["--target-sparsity", "0.5", "--trainings", "2"], ["--target-nonzeros", "10", "--trainings", "2"],
    ["--per-layer", "--method", "pathprox"], ["--debias", "1"], ["--radius", "0"], ["--epochs", "0"],
    ["--epochs", "-1"],
    ["--batch-size", "1"], ["--method", "adam"], ["--device", "cuda:7"], ["--published", "--method", "pathprox"],
)  # fmt: skip
LOSSES = ([], [], ["--loss", "squared"], ["--loss", "poisson"])


@dataclass(frozen=True)
class Commands:
    """What a case runs, one command line after another."""

    seed: int
    faults: tuple[str, str]
    lines: tuple[list[str], ...]


def make_case(seed: int, folder: Path) -> Commands:
    """Write the files of a case into an empty folder and give the command lines on them.

    Every seventh case is of `train`, `plateau` or (rarely, as it starts processes) `zoo`.
    """
    draw = random.Random(f"case {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if seed % 7 == 6:
        return make_other_case(seed, folder, draw)
    module, shape, kind = design(seed)
    checkpoint = folder / draw.choice(("net.pt", "net.safetensors"))
    state = module.state_dict()
    if checkpoint.suffix == ".pt":
        torch.save(draw.choice((state, {"state_dict": state})), checkpoint)
    else:
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, checkpoint)
    fault = "none" if draw.random() < 0.5 else draw.choice(FAULTS)
    other = "none" if draw.random() < 0.8 else draw.choice(FAULTS)
    data = write_data(folder / "data.npz", shape, kind, fault, draw)
    evaluation = write_data(folder / "eval.npz", shape, kind, other, draw, 30)
    network = ["--arch", f"{__name__}:build", "--arch-arg", f"seed={seed}"]
    out = str(folder / "out")
    scored = ["--eval", evaluation] if draw.random() < 0.6 else []
    run = [str(checkpoint), *network, "--data", data, *scored, *draw.choice(WIDTHS), *draw.choice(EXTRAS)]
    arch = ["--arch", f"{__name__}:build"]
    after: list[list[str]] = [
        ["evaluate", out, "--eval", evaluation, *arch],
        ["verify", out, *arch],
        ["verify", out, "--eval", evaluation, *arch],
        ["inspect", out, "--data", data, *arch],
        ["export", out, "--to", "pt2", *arch],
        ["report", out],
        ["compare", out, out],
        ["finetune", out, "--data", data, *arch, "--epochs", "1", "--output", str(folder / "tuned")],
        [out, "--data", data, *arch, "--keep", "0.5", "--output", str(folder / "again")],
    ]
    before: list[list[str]] = [
        ["inspect", str(checkpoint), *network, "--input-shape", ",".join(map(str, shape))],
        ["inspect", str(checkpoint), *network, "--data", data, *draw.choice(([], ["--deep"]))],
        ["balance", str(checkpoint), *network, "--data", data, "--output", str(folder / "balanced.safetensors")],
        ["finetune", str(checkpoint), *network, "--data", data, "--epochs", "1", "--output", str(folder / "tuned")],
    ]
    if draw.random() < 0.3:
        return Commands(seed, (fault, other), (draw.choice(before),))
    if draw.random() < 0.5:
        return Commands(seed, (fault, other), ([*run, "--dry-run"],))
    return Commands(seed, (fault, other), ([*run, "--output", out], draw.choice(after)))


def make_other_case(seed: int, folder: Path, draw: random.Random) -> Commands:
    """A case of `train`, `plateau` or `zoo`."""
    module, shape, kind = design(seed)
    faults = (draw.choice((*["labels"] * 30, *FAULTS)), draw.choice((*["labels"] * 90, *FAULTS)))
    data = write_data(folder / "data.npz", shape, kind, faults[0], draw)
    evaluation = write_data(folder / "eval.npz", shape, kind, faults[1], draw, 30)
    out = str(folder / "out")
    what = draw.choice(("train",) * 6 + ("plateau",) * 3 + ("zoo",))
    if what == "train":
        recipe: dict[str, Any] = {
            "arch": f"{__name__}:build", "arch_arg": {"seed": seed}, "data": data, "output": out,
            "training": {"epochs": 1, "batch_size": draw.choice((1, 16, 64))},
        }  # fmt: skip
        if draw.random() < 0.5:
            recipe["eval"] = evaluation
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        train = ["train", str(folder / "recipe.yaml"), *draw.choice(TRAINING), *draw.choice(LOSSES)]
        then = draw.choice(
            (["report", out], [*train, "--resume"], [*train, "--force"], ["evaluate", out, "--eval", evaluation])
        )
        return Commands(seed, faults, (train, then))
    if what == "plateau":
        widths_ = draw.choice(("1,2", "2", "4,1", "0", "x", "1,1"))
        steps = ["--steps", draw.choice(("1", "5", "0"))]
        return Commands(seed, faults, (["plateau", "--data", data, "--widths", widths_, *steps, *draw.choice(LOSSES)],))
    checkpoint = folder / "net.pt"
    torch.save(module.state_dict(), checkpoint)
    defaults: dict[str, Any] = {"data": data, "keep": draw.choice((0.5, 1, "50%", 2)), "arch": f"{__name__}:build"}
    model = {"name": draw.choice(NAMES), "checkpoint": str(checkpoint), "arch_arg": {"seed": seed}}
    zoo = {"output": out, "defaults": defaults, "models": [model], "jobs": 1, "threads": 1}
    (folder / "zoo.yaml").write_text(yaml.safe_dump(zoo))
    return Commands(seed, faults, (["zoo", str(folder / "zoo.yaml")], ["compare", out]))


def meet_case(commands: Commands, *, process: bool = False) -> tuple[list[int | None], str | None]:
    """The exit codes of a case's command lines, up to the first that is not 0, and what is wrong with them.

    Wrong are an exception, an unknown exit code, not exactly one line of error, memory that runs out; None: nothing.

    Args:
        process: each command in a process of its own.
    """
    codes: list[int | None] = []
    for line in commands.lines:
        said = f"seed {commands.seed} {commands.faults}: {' '.join(line)}"
        try:
            code, text = call_process(line) if process else call(line)
        except BaseException:
            return [*codes, None], f"{said}\n{traceback.format_exc(limit=-4)}"
        codes.append(code)
        errors = [each for each in text.splitlines() if each.startswith("error: ")]
        many = line[0] == "zoo" and not errors  # a zoo whose models failed says so in a table
        if (
            code not in EXIT_CODES
            or (len(errors) != bool(code) and not many)
            or "Traceback" in text
            or "not enough memory" in text
        ):
            return codes, f"{said}\n{code}: {text[-500:]}"
        if code:
            break
    return codes, None


def call_process(line: list[str]) -> tuple[int, str]:
    """The exit code and what went to stderr of a command run in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "compress", *line], capture_output=True, text=True, check=False, env=environment
    )
    return done.returncode, done.stderr
