"""The main job on small networks of unusual shapes: what it reports is what the narrowed networks do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import compress
from compress.api import RunResult
from compress.cli import main
from compress.compression.problem import fit_samples
from compress.data import open_data
from compress.errors import CompressError, DataError, NothingToCompressError
from compress.report.model import LayerReport
from tests import strange_networks

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")

IMAGE, VECTOR, TOKENS = (3, 8, 8), (10,), (9,)
SHAPES: dict[str, tuple[int, ...]] = {
    "inverted_residual": IMAGE,
    "grouped": IMAGE,
    "grouped_output": IMAGE,
    "residual": IMAGE,
    "Dense": IMAGE,
    "SqueezeExcite": IMAGE,
    "Inception": IMAGE,
    "without_bias": IMAGE,
    "conv1d": (4, 27),
    "conv3d": (1, 6, 8, 8),
    "transposed": IMAGE,
    "Vit": IMAGE,
    "EncoderLayer": (5, 6),
    "Glu": VECTOR,
    "padded": IMAGE,
    "narrow_mlp": VECTOR,
    "degenerate": VECTOR,
    "all_dead": VECTOR,
    "dead_conv": IMAGE,
    "Shared": VECTOR,
    "BufferNorm": VECTOR,
    "FixedBatch": IMAGE,
    "SeveralOutputs": VECTOR,
    "regression": VECTOR,
    "segmentation": IMAGE,
    "Bert": TOKENS,
    "opt": TOKENS,
    "Tokens": TOKENS,
}
UNLABELLED = {"grouped_output", "transposed", "segmentation", "regression"}
SAMPLES, EVALUATED = 150, 33


def build(name: str, **arguments: Any) -> nn.Module:
    """The network with seeded random weights, eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: nn.Module = getattr(strange_networks, name)(**arguments)
    return module.eval()


def write_inputs(path: Path, name: str, count: int, seed: int, *, labels: bool = False) -> Path:
    """Seeded inputs of the network's shape, tokens where it reads tokens."""
    generator = np.random.default_rng(seed)
    shape = SHAPES[name]
    inputs = generator.standard_normal((count, *shape)).astype(np.float32)
    if shape is TOKENS:
        inputs = generator.integers(1, 40, (count, *shape))
    np.savez(path, inputs=inputs, **({"labels": generator.integers(0, 5, count)} if labels else {}))
    return path


def options(name: str, folder: Path, dtype: torch.dtype | None = None, **arguments: Any) -> dict[str, Any]:
    """A recipe's options for a network, its checkpoint and its data being written into `folder`."""
    module = build(name, **arguments)
    torch.save({key: value.to(dtype) if value.is_floating_point() else value for key, value in
                module.state_dict().items()}, folder / "net.pt")  # fmt: skip
    return {
        "checkpoint": str(folder / "net.pt"),
        "arch": f"tests.strange_networks:{name}",
        "arch_arg": arguments,
        "data": str(write_inputs(folder / "data.npz", name, SAMPLES, 1)),
        "eval": str(write_inputs(folder / "eval.npz", name, EVALUATED, 2, labels=name not in UNLABELLED)),
        "output": str(folder / "out"),
    }


def run(given: dict[str, Any], **more: Any) -> RunResult:
    """The main job."""
    return compress.run(compress.make_recipe({**given, **more}))


def cut_layers(result: RunResult) -> dict[str, LayerReport]:
    """The layers that lost units, by name."""
    return {layer.name: layer for layer in result.report.layers if layer.kept < layer.units}


@pytest.mark.parametrize("name", SHAPES)
def test_every_network_is_cut_verified_written_and_loaded(name: str, tmp_path: Path) -> None:
    result = run(options(name, tmp_path), keep=0.5)
    assert cut_layers(result)
    assert result.report.verification.narrowed_deviation <= 1e-5
    before, after = result.report.cost.parameters
    assert after < before
    assert result.report.evaluation.samples == EVALUATED
    for layer in result.report.layers:
        assert 1 <= layer.kept == max(1, round(layer.units / 2))


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize(("name", "dtype"), [("Tokens", torch.bfloat16), ("FixedBatch", torch.float64)])
def test_a_fresh_process_loads_it_and_evaluation_knows_its_inputs(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    result = run(options(name, tmp_path, dtype), keep=0.5)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    again = compress.evaluate(tmp_path / "out", str(tmp_path / "eval.npz"), trust_code=True)
    assert again["samples"] == EVALUATED
    assert again["top1"] == pytest.approx(result.report.evaluation.compressed.top1)
    assert again["loss"] == pytest.approx(result.report.evaluation.compressed.loss)


@pytest.mark.parametrize(("name", "dtype"), [("residual", torch.float64), ("Vit", torch.float16)])
def test_a_checkpoint_comes_back_in_its_own_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run(options(name, tmp_path, dtype), keep=0.5)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {dtype}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("padded", {"mode": "circular"}), ("Vit", {"gated": True}), ("SeveralOutputs", {"kind": "tuple"})],
)
def test_variants_are_cut_too(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    assert cut_layers(run(options(name, tmp_path, **arguments), keep=0.5))


@pytest.mark.parametrize("name", ["residual", "inverted_residual", "Vit", "Bert"])
def test_streams_are_cut_when_asked(name: str, tmp_path: Path) -> None:
    given = options(name, tmp_path)
    alone, coupled = run(given, keep=0.5), run(given, keep=0.5, couple=True, force=True)
    assert set(cut_layers(alone)) < set(cut_layers(coupled))


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        ("residual", "macs"), ("grouped", "macs"), ("Inception", "params"), ("transposed", "macs"),
        ("FixedBatch", "params"), ("Tokens", "params"), ("segmentation", "macs"), ("conv3d", "macs"),
        ("Shared", "params"),
    ],
)  # fmt: skip
def test_a_budget_is_kept_and_costs_are_as_predicted(name: str, cost: str, tmp_path: Path) -> None:
    report = run(options(name, tmp_path), **{cost: 0.7}).report
    before, after = getattr(report.cost, {"macs": "macs", "params": "parameters"}[cost])
    assert after <= 0.7 * before
    assert report.search.predicted_costs[cost] == pytest.approx(after / before, abs=1e-6)


@pytest.mark.parametrize("name", ["Vit", "FixedBatch", "SeveralOutputs"])
def test_an_accuracy_bound_works_on_it(name: str, tmp_path: Path) -> None:
    assert run(options(name, tmp_path), max_drop=60, force_gate=True).report.evaluation.drop_points <= 60


@pytest.mark.parametrize("name", ["grouped", "Vit"])
def test_the_same_run_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    given = options(name, tmp_path)
    for folder in ("one", "two"):
        run(given, keep=0.5, output=str(tmp_path / folder))
    one, two = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two


def read_outputs(module: nn.Module, readers: list[str], batches: list[Tensor]) -> list[list[Tensor]]:
    """What the readers make of their inputs, rows by channel, one tensor for each block of a grouped convolution.

    A batch norm counts as the consumer in front of it: its input less its running mean, where a constant goes.
    """
    seen: dict[str, list[Tensor]] = {reader: [] for reader in readers}

    def watch(reader: str) -> Any:
        part = module.get_submodule(reader)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = output.detach().double()
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert part.running_mean is not None
                mean = part.running_mean.double()
                rows = inputs[0].detach().double() - mean.reshape(-1, *[1] * (rows.ndim - 2))
            seen[reader].append(rows.movedim(1, -1).flatten(0, -2) if rows.ndim == 4 else rows.flatten(0, -2))

        return part.register_forward_hook(hook)

    handles = [watch(reader) for reader in readers]
    with torch.no_grad():
        for batch in batches:
            module(batch)
    for handle in handles:
        handle.remove()
    blocks = [getattr(module.get_submodule(reader), "groups", 1) for reader in readers]
    return [list(torch.cat(seen[reader]).chunk(count, 1)) for reader, count in zip(readers, blocks, strict=True)]


def measured_error(original: nn.Module, other: nn.Module, readers: list[str], batches: list[Tensor]) -> float:
    """Root mean square over the readings of ‖Ψ − Ψ̂‖/‖Ψ − mean Ψ‖, by running both networks."""
    squares = []
    for wanted, found in zip(*(read_outputs(each, readers, batches) for each in (original, other)), strict=True):
        for one, two in zip(wanted, found, strict=True):
            squares.append(float((one - two).square().sum() / (one - one.mean(0)).square().sum()))
    return float(np.mean(squares) ** 0.5)


READERS = {
    "inverted_residual": ("3.body.0", ["3.body.7"]),
    "grouped": ("0", ["4"]),
    "grouped_output": ("0", ["2"]),
    "residual": ("3.body.0", ["3.body.4"]),
    "SqueezeExcite": ("first", ["reduce", "second"]),
    "Inception": ("last", ["tail.2"]),
    "without_bias": ("0", ["4"]),
    "conv3d": ("3", ["7"]),
    "transposed": ("2", ["4"]),
    "Vit": ("block.query", ["block.out"]),
    "EncoderLayer": ("layer.linear1", ["layer.linear2"]),
    "BufferNorm": ("first", ["norm"]),
    "Shared": ("block.0", ["block.2"]),
    "FixedBatch": ("conv", ["hidden"]),
}


@pytest.mark.parametrize("name", READERS)
def test_the_reported_errors_are_those_of_the_narrowed_layer(name: str, tmp_path: Path) -> None:
    layer, readers = READERS[name]
    given = options(name, tmp_path)
    result = run(given, keep=0.5, layer=(layer,))
    (found,) = cut_layers(result).values()
    batch = 2 if name == "FixedBatch" else 16
    *streams, _ = fit_samples(open_data(given["data"], None), 10**6, 0.1, batch, 0, whole_batches=name == "FixedBatch")
    original = build(name)
    for stream, key in zip(streams, ("error", "held_back_error"), strict=True):
        batches = [stream.batch(number).inputs for number in range(len(stream.sizes()))]
        assert measured_error(original, result.module, readers, batches) == pytest.approx(
            getattr(found.fit, key), rel=1e-3
        )


@pytest.mark.parametrize(
    ("name", "layer", "reader"),
    [("without_bias", "3", "6"), ("transposed", "2", "4"), ("Vit", "block.up", "block.down")],
)
def test_the_refit_beats_removal_without_it(name: str, layer: str, reader: str, tmp_path: Path) -> None:
    given = options(name, tmp_path)
    result = run(given, keep=0.5, layer=(layer,))
    (found,) = cut_layers(result).values()
    kept = result_units(tmp_path / "out", layer)
    original = build(name)
    masked = copy.deepcopy(original)
    weight = masked.get_submodule(reader).weight
    dim = 0 if isinstance(masked.get_submodule(reader), nn.ConvTranspose2d) else 1
    removed = [unit for unit in range(found.units) if unit not in kept]
    with torch.no_grad():
        weight.index_fill_(dim, torch.tensor(removed), 0)
    fitting, *_ = fit_samples(open_data(given["data"], None), 10**6, 0.1, 16, 0)
    batches = [fitting.batch(number).inputs for number in range(len(fitting.sizes()))]
    assert found.fit.error < measured_error(original, masked, [reader], batches)


def result_units(folder: Path, layer: str) -> list[int]:
    """Units that stayed in a layer."""
    import json

    return list(json.loads((folder / "config.json").read_text())["kept"][layer])


@pytest.mark.parametrize(("name", "keep"), [("dead_conv", 5), ("degenerate", 16)])
def test_dead_constant_and_twin_units_cost_nothing(name: str, keep: int, tmp_path: Path) -> None:
    result = run(options(name, tmp_path), keep=keep, layer=("0",))
    assert result.report.evaluation.relative_output_change < 1e-5
    assert result.report.evaluation.agreement == 1.0


def test_with_few_samples_the_refit_does_not_lose_to_the_weights_as_they_are(tmp_path: Path) -> None:
    given = options("FixedBatch", tmp_path)
    write_inputs(tmp_path / "data.npz", "FixedBatch", 40, 1)
    fit = run(given, keep=7, layer=("conv",)).report.layer("conv").fit
    assert fit.inherited_error < 1e-5  # all units: 288 columns, 36 rows
    assert fit.held_back_error < 1.0


@pytest.fixture(scope="module")
def flattened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for 64 units of 49 columns each and 150 samples, within 8 MiB."""
    SHAPES["flattened"] = IMAGE
    return {**options("flattened", tmp_path_factory.mktemp("flattened")), "memory": "8M", "force": True}


def test_units_beyond_the_memory_bound_are_short_listed(flattened: dict[str, Any]) -> None:
    (layer,) = cut_layers(run(flattened, keep=4, layer=("0",))).values()
    assert layer.kept == 4
    assert "5 of 64 units considered" in layer.fit.sampling


def test_no_layer_is_cut_deeper_than_asked_for_want_of_memory(flattened: dict[str, Any]) -> None:
    with pytest.raises(NothingToCompressError):
        run(flattened, keep=0.5, layer=("0",))
    layer = run(flattened, error=0.4).report.layer("0")
    assert layer.kept == 64
    assert layer.fit.held_back_error < 1e-5
    assert "left as it is" in layer.fit.sampling


def test_a_search_with_short_memory_keeps_its_budget(flattened: dict[str, Any]) -> None:
    before, after = run(flattened, params=0.5).report.cost.parameters
    assert after <= 0.5 * before


def test_a_latency_budget_is_searched_with_short_memory(flattened: dict[str, Any]) -> None:
    report = run(flattened, latency=0.95, fold="off", in_place="off", memory_format="keep").report
    assert report.search.predicted_costs["latency"] <= 0.95 + 1e-9


def test_readings_that_share_the_memory_are_short_listed_together(tmp_path: Path) -> None:
    report = run(options("Inception", tmp_path), keep=0.5, memory="100K").report
    assert all(layer.units >= layer.kept > 0 for layer in report.layers)


def test_nothing_to_cut_is_said_with_every_reason(tmp_path: Path) -> None:
    SHAPES["Tied"] = VECTOR
    with pytest.raises(NothingToCompressError, match="computed and not a parameter"):
        run(options("Tied", tmp_path), keep=0.5)


def test_inputs_that_do_not_fit_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = options("residual", tmp_path)
    np.savez(tmp_path / "data.npz", inputs=np.zeros((20, 4, 8, 8), np.float32))
    arguments = [given["checkpoint"], "--arch", given["arch"], "--data", given["data"], "--keep", "0.5"]
    assert main([*arguments, "--output", given["output"]]) == 1
    error = capfd.readouterr().err
    assert "does not run on inputs of shape (2, 4, 8, 8)" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["regression", "segmentation"])
def test_labels_for_outputs_that_are_no_class_scores_are_refused_first(name: str, tmp_path: Path) -> None:
    given = options(name, tmp_path)
    write_inputs(tmp_path / "eval.npz", name, EVALUATED, 2, labels=True)
    with pytest.raises(DataError, match="fit no output of the network"):
        run(given, keep=0.5)


@pytest.mark.parametrize(("name", "count"), [("degenerate", 8), ("all_dead", 8), ("Vit", 9), ("FixedBatch", 10)])
def test_a_handful_of_samples_is_enough(name: str, count: int, tmp_path: Path) -> None:
    given = options(name, tmp_path)
    write_inputs(tmp_path / "data.npz", name, count, 1)
    assert cut_layers(run(given, keep=0.5))


@pytest.mark.parametrize(
    "more", [{}, {"penalty": 0.1}, {"round_to": 4, "keep": 0.3}, {"unit_costs": "feature", "keep": 1}]
)
@pytest.mark.parametrize("name", ["grouped", "narrow_mlp", "all_dead"])
def test_every_width_rule_ends_well(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    try:
        result = run(options(name, tmp_path), **more)
    except CompressError as fault:
        assert isinstance(fault, NothingToCompressError)  # noqa: PT017 - it may end either way
    else:
        assert result.report.verification.narrowed_deviation <= 1e-5
