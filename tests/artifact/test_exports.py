"""ONNX, `.pt2` and the Hub folder: each loads, gives the network's outputs, and holds nothing that it should not."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.api import writing
from compress.artifact.checksums import check_checksums, write_checksums
from compress.artifact.exports import onnx_file
from compress.artifact.exports import writing as writing_module
from compress.artifact.exports.hub_folder import model_card
from compress.artifact.exports.onnx_file import OnnxNetwork, write_onnx
from compress.artifact.exports.pt2_file import keeps_weights_raw, load_pt2, write_pt2
from compress.checkpoint.building.builders import build_architecture
from compress.cli import main
from compress.demo import DEMO_OPTIONS
from compress.errors import OutputError, UnsupportedError
from tests.report.reports import make_report

EVALUATION = str(DEMO_OPTIONS["eval"])
RUN = [str(DEMO_OPTIONS["checkpoint"]), "--data", "digits", "--calibration-samples", "300", "--eval", EVALUATION]
KINDS = tuple(kind for kind in ("onnx", "pt2", "hf") if kind != "pt2" or keeps_weights_raw())
PLACES = {"onnx": "model.onnx", "pt2": "model.pt2", "hf": "hf"}


RAW = pytest.mark.skipif(not keeps_weights_raw(), reason="this torch pickles the weights of a .pt2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that a run exported to every kind."""
    folder = tmp_path_factory.mktemp("exports") / "out"
    kinds = [part for kind in KINDS for part in ("--export", kind)]
    assert main([*RUN, "--keep", "0.5", *kinds, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small network with a convolution and a batch norm, eval mode."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3)]
    return nn.Sequential(*layers).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_every_export_gives_the_networks_outputs_at_any_batch_size(written: Path, kind: str, count: int) -> None:
    with torch.inference_mode():
        expected = compress.load(written)(images(count))
        found = compress.load(written / PLACES[kind])(images(count))
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_the_report_says_what_was_checked_and_every_file_has_its_hash(written: Path) -> None:
    report = json.loads((written / "report.json").read_text())
    assert [one["kind"] for one in report["exports"]] == list(KINDS)
    for one in report["exports"]:
        assert [check["batch_size"] for check in one["checks"]] == [1, 3]
        assert all(check["deviation"] < 1e-4 for check in one["checks"])
    assert all(latency["exported_ms"] > 0 for latency in report["exports"][0]["latency"])
    assert "onnxruntime" in (written / "report.html").read_text()
    statuses = check_checksums(written)
    assert {"model.onnx", "hf/README.md", "hf/config.json", "hf/model.safetensors"} < set(statuses)
    assert set(statuses.values()) == {"same"}


def test_an_export_later_is_the_export_of_the_run_and_verifies(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "out"))
    (folder / "model.onnx").unlink()
    write_checksums(folder)
    names = [PLACES[kind] for kind in KINDS if kind != "hf"]
    assert main(["export", str(folder), *(f"--to={kind}" for kind in KINDS)]) == 0  # all but the first are replaced
    for name in names:
        assert (folder / name).read_bytes() == (written / name).read_bytes()
    assert main(["verify", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {path.name for path in written.iterdir()}


@pytest.mark.parametrize("write", [write_onnx, pytest.param(write_pt2, marks=RAW)])
def test_the_same_network_gives_the_same_bytes_without_source_locations(
    write: object, network: nn.Module, tmp_path: Path
) -> None:
    paths = [tmp_path / name / "model.pt2" for name in ("first", "second")]
    for path in paths:
        path.parent.mkdir()
        write(network, images(2), path)  # type: ignore[operator]
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    for trace in (b"site-packages", b"container.py", b'stack_trace": "File', str(Path(__file__).parent).encode()):
        assert trace not in first


@RAW
def test_a_network_of_one_batch_size_is_exported_for_that_size(network: nn.Module, tmp_path: Path) -> None:
    write_onnx(network, images(2), tmp_path / "model.onnx", dynamic=False)
    write_pt2(network, images(2), tmp_path / "model.pt2", dynamic=False)
    for name in ("model.onnx", "model.pt2"):
        found = compress.load(tmp_path / name)
        assert torch.allclose(found(images(2)), network(images(2)), atol=1e-5)
        with pytest.raises(Exception, match=r"(?i)batch|dimension|shape|got: 3|guard"):
            found(images(3))


class NoOnnxForm(nn.Module):
    """Eigenvalues of a matrix, which ONNX has no operator for."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.linalg.eigvals(inputs).real


def test_an_operation_without_an_onnx_form_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no ONNX form") as caught:
        write_onnx(NoOnnxForm(), torch.eye(3).repeat(2, 1, 1), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_an_export_that_fails_leaves_the_artifact_whole_and_ends_with_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> dict[str, object]:
        raise UnsupportedError("The network has no ONNX form: aten.example.")

    monkeypatch.setattr(writing, "write_export", refuse)
    assert main([*RUN, "--keep", "0.5", "--export", "onnx", "--output", str(tmp_path / "out")]) == 5
    assert "aten.example" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["verify", str(tmp_path / "out"), "--eval", EVALUATION]) == 0
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_missing_packages_are_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(onnx_file.importlib, "import_module", missing)
    assert main(["missing.pt", "--data", "digits", "--export", "onnx", "--output", str(tmp_path / "out")]) == 5
    assert "compress-networks[onnx]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere", "--to", "onnx"], 1, "nowhere"),
        (["nowhere", "--to", "tensorflow"], 2, "onnx, pt2, hf"),
        (["nowhere"], 2, "--to"),
    ],
)
def test_a_wrong_export_command_is_one_line(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken", b"\x08\x07" * 100])
def test_a_damaged_file_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OutputError):
        compress.load(tmp_path / name)
    with pytest.raises(OutputError):
        compress.load(tmp_path / "nowhere" / name)


def test_an_onnx_file_that_reads_other_files_is_refused(network: nn.Module, tmp_path: Path) -> None:
    import onnx

    write_onnx(network, images(2), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(OutputError, match="other files"):
        OnnxNetwork(tmp_path / "split.onnx")


@pytest.mark.parametrize("place", ["function", "sparse initializer", "attribute", "sparse attribute", "inner graph"])
def test_tensors_in_other_files_are_refused_wherever_an_onnx_file_hides_them(place: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    secret = onnx.helper.make_tensor("secret", onnx.TensorProto.FLOAT, [1], [1.0])
    secret.ClearField("float_data")
    secret.data_location = onnx.TensorProto.EXTERNAL
    secret.external_data.add(key="location", value="../../secret")
    indices = onnx.helper.make_tensor("places", onnx.TensorProto.INT64, [1], [0])
    sparse = onnx.helper.make_sparse_tensor(secret, indices, [3])
    holder = onnx.helper.make_node("Constant", [], ["held"])
    key, value = {
        "sparse attribute": ("sparse_value", sparse),
        "inner graph": ("body", onnx.helper.make_graph([], "inner", [], [], initializer=[secret])),
    }.get(place, ("value", secret))
    holder.attribute.append(onnx.helper.make_attribute(key, value))
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("in", "out")]
    nodes = [onnx.helper.make_node("Identity", ["in"], ["out"])]
    graph = onnx.helper.make_graph(nodes, "outer", values[:1], values[1:])
    model = onnx.helper.make_model(graph)
    if place == "function":
        opsets = [onnx.helper.make_opsetid("", 17)]
        model.functions.append(onnx.helper.make_function("local", "hidden", [], ["held"], [holder], opsets))
    elif place == "sparse initializer":
        model.graph.sparse_initializer.append(sparse)
    else:
        model.graph.node.append(holder)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OutputError, match="other files"):
        OnnxNetwork(tmp_path / "model.onnx")


def test_the_model_card_is_one_that_the_hub_reads(written: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from huggingface_hub import ModelCard
    card = ModelCard.load(written / "hf" / "README.md")
    report = json.loads((written / "report.json").read_text())
    assert card.data.library_name == "compress-networks"
    assert card.data.eval_results is not None
    assert card.data.eval_results[0].metric_value == pytest.approx(report["evaluation"]["compressed"]["top1"])
    assert f"{report['cost']['parameters'][1]:,}" in card.text


def test_a_card_without_an_evaluation_claims_no_accuracy() -> None:
    assert "model-index" not in model_card(replace(make_report(), evaluation=None))


@RAW
def test_a_multilayer_perceptron_in_double_precision_is_exported_in_it(tmp_path: Path) -> None:
    module = build_architecture("compress:mlp", {"widths": [4, 6, 3]}).double().eval()
    inputs = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    write_pt2(module, inputs, tmp_path / "model.pt2")
    assert torch.equal(load_pt2(tmp_path / "model.pt2")(inputs), module(inputs))


def test_a_torch_that_pickles_weights_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writing_module, "keeps_weights_raw", lambda: False)
    assert main(["missing.pt", "--data", "digits", "--export", "pt2"]) == 5
    assert "as a pickle" in capsys.readouterr().err
