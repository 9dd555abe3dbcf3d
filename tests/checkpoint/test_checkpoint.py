"""Reading files: formats, wrappers, prefixes, dtypes, and what is said about them."""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress.checkpoint.reading.read import STATE_KEYS, load_checkpoint
from compress.errors import CheckpointError, NonFiniteError, UnsupportedError, UntrustedPickleError


def small_state(dtype: torch.dtype = torch.float32) -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        (name, torch.randn(shape, generator=generator).to(dtype))
        for name, shape in {"fc1.weight": (5, 4), "fc1.bias": (5,), "fc2.weight": (3, 5), "fc2.bias": (3,)}.items()
    )


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name])


@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "tar"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_of_every_ending_are_read(tmp_path: Path, ending: str, legacy: bool) -> None:
    path = tmp_path / f"net.{ending}"
    torch.save(small_state(), path, _use_new_zipfile_serialization=not legacy)
    found = load_checkpoint(path)
    assert_same(found.state, small_state())
    assert found.format == ("legacy" if legacy else "zip")


def test_safetensors_are_read_whatever_the_ending(tmp_path: Path) -> None:
    save_file(small_state(), tmp_path / "net.pt")
    found = load_checkpoint(tmp_path / "net.pt")
    assert found.format == "safetensors"
    assert_same(dict(sorted(found.state.items())), dict(sorted(small_state().items())))


def test_the_sha256_and_the_size_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(small_state(), path)
    found = load_checkpoint(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.bytes == path.stat().st_size


@pytest.mark.parametrize("key", STATE_KEYS)
def test_every_usual_wrapper_key_is_found(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, key: small_state(), "optimizer": {"lr": 0.1}}, tmp_path / "net.pt")
    found = load_checkpoint(tmp_path / "net.pt")
    assert found.state_key == key
    assert_same(found.state, small_state())


def test_averaged_weights_are_preferred_to_plain_ones(tmp_path: Path) -> None:
    averaged = {name: tensor + 1 for name, tensor in small_state().items()}
    torch.save({"state_dict": small_state(), "state_dict_ema": averaged}, tmp_path / "net.pt")
    found = load_checkpoint(tmp_path / "net.pt")
    assert found.state_key == "state_dict_ema"
    assert_same(found.state, averaged)


def test_wrappers_in_wrappers_are_followed(tmp_path: Path) -> None:
    torch.save({"model": {"state_dict": small_state()}}, tmp_path / "net.pt")
    assert load_checkpoint(tmp_path / "net.pt").state_key == "model.state_dict"


def test_a_dotted_state_key_leads_to_an_unusual_place(tmp_path: Path) -> None:
    torch.save({"mine": {"student": small_state()}}, tmp_path / "net.pt")
    found = load_checkpoint(tmp_path / "net.pt", state_key="mine.student")
    assert found.state_key == "mine.student"
    assert_same(found.state, small_state())


def test_a_wrong_state_key_lists_the_right_ones(tmp_path: Path) -> None:
    torch.save({"mine": small_state(), "epoch": 1}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"no key 'yours'.*'mine', 'epoch'"):
        load_checkpoint(tmp_path / "net.pt", state_key="yours")


def test_a_dict_without_tensors_asks_for_the_state_key(tmp_path: Path) -> None:
    torch.save({"mine": small_state(), "epoch": 1}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"'mine', 'epoch'; give --state-key"):
        load_checkpoint(tmp_path / "net.pt")


def test_prefixes_are_stripped_repeatedly(tmp_path: Path) -> None:
    torch.save({f"module._orig_mod.module.{k}": v for k, v in small_state().items()}, tmp_path / "net.pt")
    found = load_checkpoint(tmp_path / "net.pt")
    assert found.prefix == "module._orig_mod.module."
    assert_same(found.state, small_state())


def test_a_compiled_submodule_loses_its_mark(tmp_path: Path) -> None:
    torch.save({k.replace("fc1.", "fc1._orig_mod."): v for k, v in small_state().items()}, tmp_path / "net.pt")
    assert_same(load_checkpoint(tmp_path / "net.pt").state, small_state())


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    torch.save({**small_state(), "module.extra": torch.ones(2)}, tmp_path / "net.pt")
    assert "module.extra" in load_checkpoint(tmp_path / "net.pt").state


def test_an_averaged_models_counter_does_not_hide_its_prefix(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(4, 3))
    torch.save(averaged.state_dict(), tmp_path / "net.pt")
    found = load_checkpoint(tmp_path / "net.pt")
    assert set(found.state) == {"weight", "bias"}
    assert found.ignored[0].startswith("n_averaged")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_the_file_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(small_state(dtype), tmp_path / "net.pt")
    found = load_checkpoint(tmp_path / "net.pt")
    assert found.dtype == dtype
    assert_same(found.state, small_state(dtype))


def test_entries_that_are_no_tensors_are_left_out_with_the_reason(tmp_path: Path) -> None:
    torch.save({**small_state(), "step": 7}, tmp_path / "net.pt")
    found = load_checkpoint(tmp_path / "net.pt")
    assert found.ignored == ("step: int, not a tensor",)
    assert "step" not in found.state


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    state = small_state()
    state["fc2.weight"][1, 2] = value
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(NonFiniteError, match=r"`fc2\.weight` holds 1 NaN or Inf in 15 values"):
        load_checkpoint(tmp_path / "net.pt")


def test_pickle_protocol_4_is_refused_by_name_and_read_when_trusted(tmp_path: Path) -> None:
    torch.save(small_state(), tmp_path / "net.pt", pickle_protocol=4)
    with pytest.raises(UntrustedPickleError, match=r"pickle protocol 4.*OrderedDict.*--trust-pickle"):
        load_checkpoint(tmp_path / "net.pt")
    assert_same(load_checkpoint(tmp_path / "net.pt", trust_pickle=True).state, small_state())


def test_a_pickled_module_is_refused_naming_its_classes(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 3)), tmp_path / "net.pt")
    with pytest.raises(UntrustedPickleError, match=r"Sequential.*Linear.*--trust-pickle.*state_dict\(\)"):
        load_checkpoint(tmp_path / "net.pt")


def test_a_trusted_pickled_module_is_read(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 3))
    torch.save({"model": network}, tmp_path / "net.pt")
    found = load_checkpoint(tmp_path / "net.pt", trust_pickle=True)
    assert isinstance(found.module, nn.Sequential)
    assert found.trusted
    assert_same(found.state, dict(network.state_dict()))


def test_a_trusted_module_of_an_unknown_class_gives_its_weights(tmp_path: Path) -> None:
    class Lost(nn.Sequential):
        pass

    Lost.__module__, Lost.__qualname__ = "__main__", "LostNet"
    network = Lost(nn.Linear(4, 3))
    import __main__

    __main__.LostNet = Lost  # type: ignore[attr-defined]
    try:
        torch.save(network, tmp_path / "net.pt")
    finally:
        del __main__.LostNet  # type: ignore[attr-defined]
    found = load_checkpoint(tmp_path / "net.pt", trust_pickle=True)
    assert found.module is None
    assert found.class_name == "__main__.LostNet"
    assert_same(found.state, dict(network.state_dict()))


def test_torchscript_is_refused(tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(nn.Linear(4, 3), torch.ones(1, 4)).save(str(tmp_path / "net.pt"))
    with pytest.raises(UnsupportedError, match="TorchScript"):
        load_checkpoint(tmp_path / "net.pt", trust_pickle=True)


def test_an_exported_program_is_refused(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(4, 3), (torch.ones(1, 4),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(UnsupportedError, match="exported program"):
        load_checkpoint(tmp_path / "net.pt2")


@pytest.mark.parametrize("kind", ["sparse", "quantized", "complex"])
def test_unusual_tensors_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = {
            "sparse": lambda: torch.eye(3).to_sparse(),
            "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "complex": lambda: torch.ones(3, dtype=torch.complex64),
        }[kind]()
        torch.save({**small_state(), "odd.weight": odd}, tmp_path / "net.pt")
    with pytest.raises(UnsupportedError, match=rf"odd\.weight. is {kind}"):
        load_checkpoint(tmp_path / "net.pt")


def test_a_plain_pickle_of_weights_says_how_to_save_them(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(pickle.dumps({"weight": [1.0, 2.0]}))
    with pytest.raises(CheckpointError, match=r"plain pickle.*torch\.save"):
        load_checkpoint(tmp_path / "net.pt")


@pytest.mark.parametrize("value", [torch.ones(3), [torch.ones(3)], {}, 3, {"a": 1}])
def test_objects_that_are_no_state_dict_are_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_checkpoint(tmp_path / "net.pt")


def test_a_wrapper_with_more_in_it_than_weights_says_how_to_convert_it(tmp_path: Path) -> None:
    import argparse

    torch.save({"net": small_state(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "net.pt")
    with pytest.raises(UntrustedPickleError, match=r"argparse\.Namespace.*save the state dict alone"):
        load_checkpoint(tmp_path / "net.pt")
    assert_same(load_checkpoint(tmp_path / "net.pt", trust_pickle=True).state, small_state())
