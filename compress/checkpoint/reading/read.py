"""From a file to a state dict, executing nothing unless the file is trusted."""

from __future__ import annotations

import hashlib
import pickle
import struct
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compress.checkpoint.reading.archive import archive_pickle, check_storages, legacy_scan, sniff_format
from compress.checkpoint.reading.pickle_scan import Scan, Stand, check_tensors, scan_pickle
from compress.errors import CheckpointError, NonFiniteError, UnsupportedError, UntrustedPickleError

STATE_KEYS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "ema", "state_dict", "model", "net",
    "model_state_dict", "model_state", "weights", "params", "module",
)  # fmt: skip
PREFIXES = ("module.", "_orig_mod.")
MAX_WRAPPERS = 4
LOAD_FAULTS = (
    RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    AssertionError, OSError, ImportError, MemoryError, OverflowError, RecursionError, NotImplementedError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A read file.

    Attributes:
        state: tensors by name, prefixes stripped, in the dtypes of the file.
        module: the module itself, where the file was a trusted full pickle whose classes are importable.
        path: of the file.
        sha256: of the file, hexadecimal.
        format: "safetensors", "zip" (torch.save) or "legacy" (torch.save before 1.6).
        state_key: dotted key of the state dict inside wrapper dicts; None where the file is the state dict.
        prefix: what was stripped from every name.
        dtype: the floating type that most numbers have.
        bytes: size of the file.
        ignored: entries beside the tensors, with the reason why each does not count.
        class_name: "package.module.Class" of a full pickled module.
        trusted: whether reading it executed code that the file names.
        hyper_parameters: what the file says of its constructor's arguments (Lightning), plain data.
    """

    state: dict[str, Tensor]
    module: nn.Module | None
    path: Path
    sha256: str
    format: str
    state_key: str | None
    prefix: str
    dtype: torch.dtype
    bytes: int
    ignored: tuple[str, ...] = ()
    class_name: str | None = None
    trusted: bool = False
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)


def load_checkpoint(path: str | Path, *, state_key: str | None = None, trust_pickle: bool = False) -> Checkpoint:
    """Read a state dict from `.pt`, `.pth`, `.bin`, `.tar` or `.safetensors`; the content decides, not the name.

    Args:
        state_key: dotted key of the state dict inside wrapper dicts; without it the usual keys are tried.
        trust_pickle: allow the file to execute code while it is read, if it cannot be read otherwise.

    Raises:
        CheckpointError: missing, empty, truncated or damaged, or it holds no state dict.
        UntrustedPickleError: reading it would execute code; the message names what.
        UnsupportedError: TorchScript, exported programs and other formats.
        NonFiniteError: NaN or Inf in a tensor.
    """
    path = Path(path)
    size = check_regular(path)
    try:
        with path.open("rb") as file:
            kind = sniff_format(file, path.name, size)
            if kind == "safetensors":
                content, missing, trusted = read_safetensors(path), set[str](), False
            else:
                scan = scan_zip(file, path.name, size) if kind == "zip" else legacy_scan(file, path.name, size)
                content, missing, trusted = read_torch(path, scan, trust_pickle)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from None
    chosen, key = choose_state(content, state_key, path.name)
    module = chosen if isinstance(chosen, nn.Module) else None
    class_name = f"{type(chosen).__module__}.{type(chosen).__qualname__}" if module is not None else None
    entries = dict(module.state_dict()) if module is not None else chosen
    state, prefix, ignored = clean_state(entries, path.name)
    check_finite(state)
    return Checkpoint(
        state=state,
        module=None if missing or prefix else module,
        path=path,
        sha256=digest,
        format=kind,
        state_key=key,
        prefix=prefix,
        dtype=main_dtype(state),
        bytes=size,
        ignored=ignored,
        class_name=class_name,
        trusted=trusted,
        hyper_parameters=hyper_parameters(content),
    )


def hyper_parameters(content: Any) -> Mapping[str, Any]:
    """The constructor's arguments that a wrapper dict keeps; empty where it keeps none."""
    for key in ("hyper_parameters", "hparams"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return {
                name: value for name, value in content[key].items() if isinstance(name, str) and name.isidentifier()
            }
    return {}


def check_regular(path: Path) -> int:
    """Size of a regular, non-empty file in bytes. Raises CheckpointError."""
    try:
        if not path.exists():
            raise CheckpointError(f"There is no file {str(path)!r}.")
        if not path.is_file():
            raise CheckpointError(f"{str(path)!r} is not a file; give the checkpoint file itself.")
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}.") from None
    if size == 0:
        raise CheckpointError(f"{str(path)!r} is empty.")
    return size


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; the reader checks every offset and size. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, *LOAD_FAULTS) as error:
        raise CheckpointError(f"{path.name!r} is not a valid safetensors file: {one_line(error)}.") from None


def read_plain(path: Path, device: torch.device) -> dict[str, Any]:
    """The dict of tensors and plain data in a file that `torch.save` wrote; nothing is executed.

    Raises:
        CheckpointError, UnsupportedError: no such file, a damaged one, or one that holds anything else.
    """
    size = check_regular(path)
    with path.open("rb") as file:
        if sniff_format(file, path.name, size) != "zip":
            raise CheckpointError(f"{path.name!r} was not written by this version of torch.save.")
        scan = scan_zip(file, path.name, size)
    if scan.blocked:
        raise UntrustedPickleError(f"{path.name!r} names {join_names(scan.blocked)}, which reading it would execute.")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except LOAD_FAULTS as error:
        raise CheckpointError(f"{path.name!r} cannot be read: {one_line(error)}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name!r} holds {describe(content)}, not a dict.")
    return content


def scan_zip(file: IO[bytes], name: str, size: int) -> Scan:
    """What a torch.save archive declares, checked against what it holds. Raises CheckpointError, UnsupportedError."""
    content, entries = archive_pickle(file, name, size)
    scan = scan_pickle(content, name)
    check_storages(scan, entries, name)
    return scan


def read_torch(path: Path, scan: Scan, trust_pickle: bool) -> tuple[Any, set[str], bool]:
    """The object in a scanned file, the classes it names that could not be imported, and whether trust was used.

    Raises:
        UntrustedPickleError: it takes more than the weights-only reader, and `trust_pickle` was not given.
        CheckpointError, UnsupportedError: it cannot be read at all.
    """
    name = path.name
    if scan.blocked and not trust_pickle:
        raise UntrustedPickleError(untrusted_message(name, scan))
    check_tensors(scan, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not scan.blocked:
            try:
                return torch.load(path, map_location="cpu", weights_only=True), set(), False
            except LOAD_FAULTS as error:
                if not isinstance(error, pickle.UnpicklingError):
                    raise CheckpointError(f"{name!r} cannot be read: {one_line(error)}.") from None
                if not trust_pickle:
                    raise UntrustedPickleError(refusal(name, scan, error)) from None
        missing: set[str] = set()
        try:
            content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=trusting_pickle(missing))
        except LOAD_FAULTS as error:
            raise CheckpointError(f"{name!r} cannot be unpickled: {one_line(error)}.") from None
        return content, missing, True


def untrusted_message(name: str, scan: Scan) -> str:
    """What reading the file would execute, and how to go on: for a whole module, and for a dict with more in it."""
    if isinstance(scan.skeleton, Stand):
        trust = (
            "read it with --trust-pickle (and --arch mymodule:Class, where its class cannot be imported under the name "
            "in the file)"
        )
        convert = 'run where its class is known: torch.save(model.state_dict(), "weights.pt")'
    else:
        trust = "read it with --trust-pickle"
        convert = 'save the state dict alone: torch.save(checkpoint["state_dict"], "weights.pt")'
    return (
        f"{name!r} is not a plain state dict: reading it would execute {join_names(scan.blocked)}. "
        f"If you trust its source, {trust}. To convert it, {convert}."
    )


def refusal(name: str, scan: Scan, error: Exception) -> str:
    """Why the weights-only reader refused a file without blocked names, and how to go on."""
    reason = one_line(error)
    if scan.protocol != 2:
        reason = f"it is in pickle protocol {scan.protocol}, torch's weights-only reader takes protocol 2"
    return (
        f"{name!r} is refused: {reason}. It names only {join_names(list(scan.globals))}. "
        "If you trust its source, read it with --trust-pickle, or save it again with torch.save(state, "
        '"weights.pt") without pickle_protocol.'
    )


def trusting_pickle(missing: set[str]) -> Any:
    """A pickle module that executes what a file names, and puts an empty nn.Module in the place of unknown classes.

    So the weights of a module whose class lived in `__main__` can be read; their names are noted in `missing`.
    """

    class TrustingUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            try:
                return super().find_class(module, name)
            except (ImportError, AttributeError):
                missing.add(f"{module}.{name}")
                return type(name.rpartition(".")[2], (EmptyModule,), {"__module__": module})

    class TrustingPickle:
        Unpickler = TrustingUnpickler
        UnpicklingError = pickle.UnpicklingError

        @staticmethod
        def load(file: IO[bytes], **options: Any) -> Any:
            return TrustingUnpickler(file, **options).load()

    return TrustingPickle


class EmptyModule(nn.Module):
    """In the place of a module class that cannot be imported: it carries weights and cannot be run."""

    def __new__(cls, *_: Any, **__: Any) -> EmptyModule:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def choose_state(content: Any, state_key: str | None, name: str) -> tuple[Any, str | None]:
    """The state dict (or trusted module) in a file's object, and the dotted key that leads there.

    Raises:
        CheckpointError: there is none, or not at `state_key`.
    """
    if state_key is not None:
        chosen = content
        for part in state_key.split("."):
            if not isinstance(chosen, Mapping) or part not in chosen:
                below = named_below(content, state_key)
                if below:
                    return below, state_key
                raise CheckpointError(f"{name!r} has no key {state_key!r}; it has {describe_keys(content)}.")
            chosen = chosen[part]
        if not is_state(chosen):
            raise CheckpointError(f"{name!r}: --state-key {state_key!r} leads to {describe(chosen)}, not a state dict.")
        return chosen, state_key
    path: list[str] = []
    while len(path) <= MAX_WRAPPERS:
        key = next((key for key in STATE_KEYS if isinstance(content, Mapping) and is_nested(content.get(key))), None)
        if key is None:
            break
        content = content[key]
        path.append(key)
    if not is_state(content):
        raise CheckpointError(
            f"{name!r} holds no state dict, but {describe(content)}"
            + (f" with {describe_keys(content)}; give --state-key" if isinstance(content, Mapping) and content else "")
            + "."
        )
    return content, ".".join(path) or None


def named_below(content: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it, at the top of a file or in its usual state dict."""
    places = [content] if not isinstance(content, Mapping) else [content, *(content.get(key) for key in STATE_KEYS)]
    for place in places:
        if isinstance(place, Mapping):
            start = f"{prefix}."
            names = [name for name in place if isinstance(name, str) and name.startswith(start)]
            below = {name.removeprefix(start): place[name] for name in names}
            if is_state(below):
                return below
    return {}


def is_nested(value: Any) -> bool:
    """Whether a wrapper's entry is a state dict, a module, or a further wrapper."""
    return is_state(value) or (isinstance(value, Mapping) and any(is_state(value.get(key)) for key in STATE_KEYS))


def is_state(value: Any) -> bool:
    """A module, or a mapping of names with at least one tensor."""
    if isinstance(value, nn.Module):
        return True
    return isinstance(value, Mapping) and any(
        isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items()
    )


def clean_state(entries: Mapping[Any, Any], name: str) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Tensors by stripped name, the prefix stripped, and what was left out with the reason.

    Raises:
        UnsupportedError: a tensor that is sparse, quantized or on no device.
        CheckpointError: two names are the same once stripped.
    """
    state: dict[str, Tensor] = {}
    ignored = []
    for key, value in entries.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            ignored.append(f"{key}: {describe(value)}, not a tensor")
            continue
        kind = unusual_kind(value)
        if kind:
            raise UnsupportedError(f"{name!r}: `{key}` is {kind}; only dense tensors of plain numbers are compressed.")
        state[key] = value.detach()
    counter = state.get("n_averaged")
    if counter is not None and counter.ndim == 0 and len(state) > 1:
        del state["n_averaged"]
        ignored.append("n_averaged: the count of an averaged model, not a weight")
    stripped = ""
    while prefix := next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        stripped += prefix
    if any("_orig_mod." in key for key in state):
        plain = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
        if len(plain) != len(state):
            raise CheckpointError(f"{name!r} holds a network both compiled and not: names repeat without `_orig_mod.`.")
        state = plain
    if not any(value.is_floating_point() for value in state.values()):
        raise CheckpointError(f"{name!r} holds no floating-point tensor; it is no trained network.")
    return state, stripped, tuple(ignored)


def unusual_kind(tensor: Tensor) -> str | None:
    """What makes a tensor unfit, in words."""
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_meta:
        return "a meta tensor without values"
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point() and tensor.element_size() < 2:
        return f"in 8-bit floats ({str(tensor.dtype).removeprefix('torch.')}) whose scale is not known"
    return None


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are NaN or Inf, naming the tensor. Raises NonFiniteError."""
    for name, tensor in state.items():
        if tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise NonFiniteError(
                    f"`{name}` holds {bad} NaN or Inf in {tensor.numel()} values; is the file damaged?"
                )


def main_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The floating type that most numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0]


def describe(value: Any) -> str:
    """A kind of object in words."""
    if isinstance(value, Mapping):
        return "an empty dict" if not value else f"a dict of {len(value)} entries"
    if isinstance(value, Tensor):
        return f"a single tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__}"


def describe_keys(value: Any) -> str:
    """The keys of a mapping, a few of them."""
    if not isinstance(value, Mapping):
        return f"no keys ({describe(value)})"
    return "the keys " + join_names([repr(key)[:60] for key in value])


def join_names(names: list[str], most: int = 6) -> str:
    """Names in a line, no control characters, no more than `most`."""
    shown = ["".join(c if c.isprintable() else "?" for c in name)[:80] for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: BaseException) -> str:
    """An error's first sentence or line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, pickle.UnpicklingError) and "WeightsUnpickler error:" in str(error):
        rest = str(error).split("WeightsUnpickler error:", 1)[1]
        lines = [line.strip() for line in rest.splitlines() if line.strip()] or lines
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
