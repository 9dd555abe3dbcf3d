"""Reading a folder that a run or a training wrote: the manifest and the tensors, checked, and the network they make."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.checkpoint.building.builders import build_architecture, check_trust, is_known, shown
from compress.checkpoint.building.without_memory import Bounds, total_bytes
from compress.checkpoint.execution import Execution
from compress.checkpoint.fitting import check_fit, in_precision, load_weights
from compress.checkpoint.parametrisations import in_common_form
from compress.checkpoint.removed import remove_modules
from compress.checkpoint.restoring import restore_shapes
from compress.checkpoint.unwrapping import unwrap
from compress.copying import deep_copy
from compress.data.calls import CallShape, spread
from compress.data.importing import is_file_spec
from compress.data.preprocessing import Preprocessing
from compress.errors import OutputError, RecipeError, UnsupportedError
from compress.measures.outputs import read_described
from compress.strict_json import check_regular, read_object, read_regular

FORMAT = 1
MODEL, CONFIG, CHECKSUMS = "model.safetensors", "config.json", "SHA256SUMS"
MOST_INPUTS = 1 << 28  # numbers in one batch that the manifest asks for
MOST_GROWTH, LEAST_BYTES = 64, 1 << 30  # of the original, against the file

Size = Annotated[int, Field(strict=True, ge=0, le=1 << 40)]
Count = Annotated[int, Field(strict=True, ge=1, le=1 << 31)]
Dtype = Literal["float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"]
Whole = Annotated[int, Field(strict=True)]


class InputEntry(BaseModel):
    """What a manifest says of an input after the first."""

    model_config = ConfigDict(frozen=True)
    shape: tuple[Count, ...] = Field(max_length=8)
    dtype: Dtype = "float32"


class ArchitectureEntry(BaseModel):
    """What a manifest says of the original network."""

    model_config = ConfigDict(frozen=True)
    spec: str = Field(min_length=1, max_length=300)
    arguments: dict[str, Any]
    input_shape: tuple[Count, ...] = Field((), max_length=8)
    input_dtype: Dtype = "float32"
    batch_size: Count | None = None
    further_inputs: tuple[InputEntry, ...] = Field((), max_length=64)
    call: Any = None

    @model_validator(mode="after")
    def _call_takes_the_inputs(self) -> ArchitectureEntry:
        if self.call is not None and CallShape.from_plain(self.call).count != 1 + len(self.further_inputs):
            raise ValueError("`call` takes another number of inputs")
        return self

    @model_validator(mode="after")
    def _batch_is_bounded(self) -> ArchitectureEntry:
        sizes = [math.prod(self.input_shape), *(math.prod(entry.shape) for entry in self.further_inputs)]
        if sum(sizes) * (self.batch_size or 1) > MOST_INPUTS:
            raise ValueError(f"a batch of more than {MOST_INPUTS} numbers")
        return self


class DataEntry(BaseModel):
    """What a manifest says of the data, as far as it is used."""

    model_config = ConfigDict(frozen=True)
    preprocessing: dict[str, Any] | None = None

    @field_validator("preprocessing")
    @classmethod
    def _preprocessing_is_one(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            Preprocessing.from_dict(value)
        return value


class RemovedEntry(BaseModel):
    """What a manifest says of a module that was taken out.

    Attributes:
        rank: of the two layers in its place.
        through: a batch norm that is folded; what stood behind it inside its module is still there.
    """

    model_config = ConfigDict(frozen=True)
    along: tuple[Annotated[int, Field(strict=True, ge=0, le=7)], ...] = Field((), max_length=8)
    outputs: Annotated[int, Field(strict=True, ge=0, le=64)] = 0
    rank: Annotated[int, Field(strict=True, ge=1, le=1 << 24)] | None = None
    through: Annotated[bool, Field(strict=True)] = False


class ExecutionEntry(BaseModel):
    """What a manifest says of how the network computes."""

    model_config = ConfigDict(frozen=True)
    memory_format: Literal["channels_last"] | None = None
    in_place: tuple[str, ...] = ()


class Manifest(BaseModel):
    """`config.json`: everything in it that is used, checked; further entries are only words."""

    model_config = ConfigDict(frozen=True)
    architecture: ArchitectureEntry
    shapes: dict[str, Annotated[tuple[Size, ...], Field(max_length=8)]]
    attributes: dict[str, Whole | tuple[Whole | str | float | None, ...]]
    hashes: dict[str, str | None]
    kept: dict[str, tuple[Size, ...]] | None = None
    removed: dict[str, RemovedEntry] = Field(default_factory=dict)
    execution: ExecutionEntry = Field(default_factory=ExecutionEntry)
    data: DataEntry | None = None


TOKENS = (0, 1)  # that networks of whole numbers are tried with; a row of zeros alone may be padding and nothing else


@dataclass(frozen=True, eq=False)
class Artifact:
    """A written folder, read back.

    Attributes:
        config: the parsed manifest; state: the tensors as stored.
        named: whether the user named the factory, and not the manifest.
    """

    folder: Path
    config: dict[str, Any]
    state: dict[str, Tensor]
    named: bool = False

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch."""
        return tuple(self.config["architecture"]["input_shape"])

    @property
    def removed(self) -> dict[str, dict[str, Any]]:
        """Path of each module that was taken out -> what stands in its place; empty in older folders."""
        return dict(self.config.get("removed") or {})

    @property
    def execution(self) -> Execution:
        """How it computes what it computes; as it is built in older folders."""
        return Execution.from_dict(self.config.get("execution") or {})

    @property
    def call(self) -> CallShape | None:
        """How the network is called; None where its inputs are its arguments, one after another."""
        call = self.config["architecture"].get("call")
        return None if call is None else CallShape.from_plain(call)

    def called(self, module: nn.Module) -> nn.Module:
        """The built network, taking its inputs one after another."""
        return module if self.call is None else spread(module, self.call)

    def examples(self, token: int, device: str = "cpu") -> tuple[Tensor, ...]:
        """A small batch of every input: seeded noise, or `token` throughout where the network reads whole numbers."""
        architecture = self.config["architecture"]
        size = architecture.get("batch_size") or 2
        first = (self.input_shape, architecture.get("input_dtype", "float32"))
        further = ((entry["shape"], entry["dtype"]) for entry in architecture.get("further_inputs") or ())
        generator = torch.Generator().manual_seed(0)

        def make(shape: Sequence[int], name: str) -> Tensor:
            dtype: torch.dtype = getattr(torch, name)
            if not dtype.is_floating_point:
                return torch.full((size, *shape), token, dtype=dtype, device=device)
            return torch.randn((size, *shape), generator=generator).to(device=device, dtype=dtype)

        return tuple(make(*entry) for entry in (first, *further))

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        """How the run described each output, by name; empty in older folders. Raises OutputError."""
        try:
            return read_described(self.config.get("outputs") or [])
        except ValueError as error:
            raise OutputError(f"{str(self.folder / CONFIG)!r} is damaged: {error}.") from None

    def build(self, *, trust_code: bool = False, model: nn.Module | None = None) -> nn.Module:
        """The compressed network in eval mode, float32 where it was stored in half precision.

        A network of the closed list is built without memory first, and must have the names and shapes of the file.

        Args:
            trust_code: the user's word for a `package.module:factory` that the manifest names.
            model: the original network, which is copied and cut, in place of what the manifest names; wrappers of
                `torch.compile` and data parallelism are taken off.

        Raises:
            UntrustedCodeError: the manifest names code, and there is no word for it; nothing was imported.
            CompressError: the architecture cannot be built here, or does not fit the tensors.
        """
        architecture = self.config["architecture"]
        if model is not None:
            plain = unwrap(model)
            return self._fill(deep_copy(plain))
        if not self.named and (not trust_code or is_file_spec(architecture["spec"])):
            check_trust(architecture["spec"], repr(str(self.folder)))
        if is_known(architecture["spec"]):
            self._try()
        return self._fill(
            build_architecture(architecture["spec"], architecture["arguments"], trusted=trust_code or self.named)
        )

    def _fill(self, module: nn.Module) -> nn.Module:
        """Cut a freshly built original and give it the file's numbers."""
        remove_modules(module, self.removed, self.state)
        state = in_common_form(module, self.state)
        module = restore_shapes(module, self.config["shapes"], self.config["attributes"])
        module = in_precision(module, state)
        load_weights(module, computed_state(state))
        return self.execution.applied(module).eval()

    def _try(self) -> None:
        """Refuse a manifest whose network is far larger than the file, or another one, before memory is taken."""
        spec, arguments = (self.config["architecture"][name] for name in ("spec", "arguments"))
        numbers = sum(tensor.numel() for tensor in self.state.values())
        bounds = Bounds.of_file(numbers, len(self.state))
        module = build_architecture(spec, arguments, memory=False, bounds=bounds)
        allowed = max(LEAST_BYTES, MOST_GROWTH * sum(tensor.nbytes for tensor in self.state.values()))
        if (wanted := total_bytes(module)) > allowed:
            raise UnsupportedError(
                f"{str(self.folder)!r} is refused: {shown(spec)} takes {wanted:.1e} bytes with its arguments, far more "
                f"than the {numbers} numbers in the file; the manifest is damaged or hostile."
            )
        remove_modules(module, self.removed, self.state)
        state = in_common_form(module, self.state)
        module = restore_shapes(module, self.config["shapes"], self.config["attributes"])
        check_fit(module, state, spec)


def read_artifact(folder: str | Path) -> Artifact:
    """Read and check a written folder: manifest, hash of the tensors, the list of hashes where there is one.

    The hashes tell damage, not forgery: whoever changes a file can change its hash. Raises OutputError.
    """
    folder = Path(folder)
    config = read_object(folder / CONFIG, OutputError, "the manifest of a folder written by compress")
    if config.get("format") != FORMAT:
        version = config.get("format")
        raise OutputError(f"{str(folder / CONFIG)!r} has format {version!r:.60}; this version reads format {FORMAT}.")
    missing = [name for name in ("architecture", "shapes", "attributes", "hashes") if name not in config]
    if missing:
        raise OutputError(f"{str(folder / CONFIG)!r} lacks {', '.join(missing)}; the folder is damaged.")
    check_manifest(config, folder)
    try:
        check_regular(folder / MODEL)
        digest = file_sha256(folder / MODEL)
        if digest != config["hashes"].get(MODEL):
            raise OutputError(
                f"{str(folder / MODEL)!r} was changed after it was written: its SHA-256 is {digest[:12]}…, "
                f"the manifest says {str(config['hashes'].get(MODEL))[:12]}…."
            )
        check_listed(folder, {MODEL: digest, CONFIG: file_sha256(folder / CONFIG)})
        state = load_file(folder / MODEL)
    except (OSError, ValueError, SafetensorError) as error:
        raise OutputError(f"{str(folder / MODEL)!r} cannot be read: {error}.") from None
    return Artifact(folder, config, state)


def open_artifact(
    folder: str | Path, *, arch: str | None = None, trust_code: bool = False
) -> tuple[Artifact, nn.Module]:
    """A written folder and the network in it, which takes its inputs one after another.

    Args:
        arch: the user's own `package.module:factory` or `file.py:factory`, in the place of one that the folder names.
        trust_code: the user's word for the one that it names.

    Raises:
        CompressError: any fault of the folder; UntrustedCodeError before anything that it names is imported.
    """
    artifact = with_arch(read_artifact(folder), arch)
    return artifact, artifact.called(artifact.build(trust_code=trust_code))


def with_arch(artifact: Artifact, arch: str | None, arguments: Mapping[str, Any] | None = None) -> Artifact:
    """The artifact with the user's own factory in the place of one that it names, and the user's arguments over its.

    The user's naming it is the user's word for it; a network of the closed list stays what the manifest says.

    Raises:
        RecipeError: the manifest names a network of the closed list, and the user another.
    """
    recorded = artifact.config["architecture"]
    if arch is not None and arch != recorded["spec"] and is_known(recorded["spec"]):
        raise RecipeError(f"arch: {str(artifact.folder)!r} says itself that it is {recorded['spec']}; leave arch out.")
    chosen = {
        **recorded,
        "spec": recorded["spec"] if arch is None else arch,
        "arguments": {**recorded["arguments"], **(arguments or {})},
    }
    return replace(artifact, config={**artifact.config, "architecture": chosen}, named=arch is not None)


def check_manifest(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a manifest with an entry of the wrong kind. Raises OutputError, which names the first."""
    try:
        Manifest.model_validate(config)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])[:100]
        reason = fault["msg"].removeprefix("Value error, ")
        raise OutputError(f"The manifest of {str(folder)!r} is damaged: {place}: {reason[:200]}.") from None


def check_listed(folder: Path, digests: Mapping[str, str]) -> None:
    """Compare with `SHA256SUMS`, where the folder has one. Raises OutputError, OSError, ValueError."""
    if not (folder / CHECKSUMS).exists():
        return
    lines = read_regular(folder / CHECKSUMS).decode("utf-8").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name, digest in digests.items():
        if listed.get(name, digest) != digest:
            raise OutputError(f"{str(folder / name)!r} was changed after it was written: {CHECKSUMS} says otherwise.")


def computed_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state as it is computed with: half-precision tensors in float32."""
    return {
        name: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        for name, tensor in state.items()
    }


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _nearest(name: str, like: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Tensors of floating point beside a name that the checkpoint does not have, or in the modules around it."""
    path = name.rpartition(".")[0]
    while True:
        beside = f"{path}." if path else ""
        yield from (each for key, each in like.items() if key.startswith(beside) and each.is_floating_point())
        if not path:
            return
        path = path.rpartition(".")[0]


def _holds_infinity(name: str, like: Mapping[str, Tensor]) -> bool:
    """Whether the checkpoint's own tensor is not finite throughout, as a mask for attention."""
    return name in like and not bool(torch.isfinite(like[name]).all())


def stored_state(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in the dtypes of the original checkpoint. A value that overflows half precision raises OutputError."""
    stored = {}
    for name, tensor in state.items():
        dtype = like[name].dtype if name in like else tensor.dtype
        if name not in like and tensor.is_floating_point():  # an added bias, a weight that was computed
            dtype = next(_nearest(name, like), tensor).dtype
        cast = tensor.detach().cpu().to(dtype).contiguous()
        if cast.is_floating_point() and not bool(torch.isfinite(cast).all()) and not _holds_infinity(name, like):
            raise OutputError(
                f"`{name}` does not fit into {str(dtype).removeprefix('torch.')}: a refitted value overflows."
            )
        stored[name] = cast.clone()
    return stored
