"""What a run that may be killed leaves on disk, and how the next one goes on from there.

The state lies in a folder beside the output and goes when the run ends well. It holds the selection curves with the
sensitivities (what the recording of all layers was for; the moments themselves would take gigabytes) and, for every
sweep, the new weights of each settled turn. Every file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.compression.layers.decisions import Plan
from compress.compression.layers.layer import LayerFacts
from compress.compression.layers.result import Settled
from compress.compression.pricing.allocate import Lowering
from compress.convex import SelectionCurve, WidthBound
from compress.digests import hash_tensors
from compress.errors import OutputError, RecipeError
from compress.strict_json import read_object

FINGERPRINT = "fingerprint.json"


def state_folder(output: Path) -> Path:
    """The folder beside the output that a run or a training which may be killed keeps its state in."""
    return output.with_name(output.name + ".state")


@dataclass(frozen=True, eq=False)
class KnownCurves:
    """Selection curves, error curves, measured divergences and facts by group, as `prepare_search` finds them.

    Attributes:
        skipped: group name -> why it has none of these and stays as it is.
    """

    curves: dict[str, SelectionCurve]
    errors: dict[str, Tensor]
    measured: dict[str, list[tuple[int, float]]]
    facts: dict[str, LayerFacts]
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunState:
    """The folder that a resumable run keeps its state in.

    Attributes:
        sweep: name of the sweep whose turns are read and written.
    """

    folder: Path
    sweep: str = "sweep"

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any]) -> RunState:
        """State in `folder`, new or of an earlier run of the same thing.

        Args:
            fingerprint: what the run depends on, as plain data.

        Raises:
            RecipeError: the state there belongs to another model, other data or options; what differs is named.
            OutputError: the folder cannot be written or read.
        """
        path = folder / FINGERPRINT
        wanted = json.loads(json.dumps(fingerprint))
        try:
            if path.is_file():
                stored = read_object(path, OutputError, "the state of a run")
                differing = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
                if differing:
                    raise RecipeError(
                        f"The state in {str(folder)!r} is of a run with other {', '.join(differing)}; give the same "
                        "options and files again, or another --resume."
                    )
            else:
                folder.mkdir(parents=True, exist_ok=True)
                draft = path.with_suffix(".new")
                draft.write_text(json.dumps(wanted), encoding="utf-8")
                draft.replace(path)
        except (OSError, ValueError) as error:
            raise OutputError(f"The state in {str(folder)!r} cannot be used: {error}. Remove that folder.") from None
        return cls(folder)

    def of_sweep(self, name: str, plan: Plan, ranks: Mapping[str, int] | None = None) -> RunState:
        """The state of one sweep of the run, of several under the same name the one with this plan and these ranks."""
        decided = sorted((group, str(decision)) for group, decision in {**plan, **(ranks or {})}.items())
        text = json.dumps([name, decided])
        return RunState(self.folder, f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:16]}")

    def read_turn(self, number: int) -> Settled | None:
        """What an earlier run settled in a turn, or None."""
        stored = self._read(f"{self.sweep}-{number}")
        return None if stored is None else Settled.from_file(*stored)

    def write_turn(self, number: int, settled: Settled) -> None:
        """Keep what a turn settled."""
        self._write(f"{self.sweep}-{number}", *settled.to_file())

    def read_curves(self) -> KnownCurves | None:
        """Curves and sensitivities of an earlier run, or None."""
        stored = self._read("curves")
        if stored is None:
            return None
        try:
            return self._known_curves(*stored)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None  # a damaged file is recomputed

    @staticmethod
    def _known_curves(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> KnownCurves:
        curves, errors, facts = {}, {}, {}
        for name, layer in about["layers"].items():
            orders = {method: tensors[f"{name}:order:{method}"] for method in layer["orders"]}
            polished = {int(width): tensors[f"{name}:polished:{width}"] for width in layer["polished"]}
            curves[name] = SelectionCurve(
                tensors[f"{name}:order"], tensors[f"{name}:curve"], tuple(layer["methods"]), orders, polished
            )
            errors[name] = tensors[f"{name}:errors"]
            rank_features, rank_outputs, units, group_size, tolerance = layer["bound"]
            spectra = tensors[f"{name}:features"], tensors[f"{name}:outputs"]
            bound = WidthBound(rank_features, rank_outputs, units, group_size, tolerance, *spectra)
            facts[name] = LayerFacts(bound, layer["dead"], layer["duplicates"])
        measured = {
            name: [(int(at), float(value)) for at, value in layer["measured"]]
            for name, layer in about["layers"].items()
        }
        return KnownCurves(curves, errors, measured, facts, dict(about["skipped"]))

    def write_curves(self, known: KnownCurves) -> None:
        """Keep curves and sensitivities."""
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {}
        for name, curve in known.curves.items():
            tensors |= {
                f"{name}:order": curve.order,
                f"{name}:curve": curve.errors,
                f"{name}:errors": known.errors[name],
                f"{name}:features": known.facts[name].bound.feature_spectrum,
                f"{name}:outputs": known.facts[name].bound.output_spectrum,
            }
            tensors |= {f"{name}:order:{method}": order for method, order in curve.orders.items()}
            tensors |= {f"{name}:polished:{width}": units for width, units in curve.polished.items()}
            bound = known.facts[name].bound
            about[name] = {
                "bound": [bound.rank_features, bound.rank_outputs, bound.units, bound.group_size, bound.tolerance],
                "dead": known.facts[name].dead,
                "duplicates": known.facts[name].duplicates,
                "methods": list(curve.methods),
                "orders": list(curve.orders),
                "polished": list(curve.polished),
                "measured": known.measured[name],
            }
        self._write("curves", tensors, {"layers": about, "skipped": known.skipped})

    def read_lowerings(self) -> tuple[tuple[Lowering, ...], dict[str, str]] | None:
        """The weights that may be given a low rank, and why others may not, of an earlier run; or None."""
        stored = self._read("lowerings")
        try:
            return None if stored is None else _known_lowerings(stored[1])
        except (KeyError, TypeError, ValueError):
            return None  # a damaged file is recomputed

    def write_lowerings(self, usable: Sequence[Lowering], refused: Mapping[str, str]) -> None:
        """Keep the weights that may be given a low rank, and why others may not."""
        self._write("lowerings", {}, {"usable": [asdict(each) for each in usable], "refused": dict(refused)})

    def remove(self) -> None:
        """Delete the state."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if metadata["digest"] != hash_tensors(tensors, metadata["about"]):
                return None
            return tensors, json.loads(metadata["about"])
        except (OSError, ValueError, KeyError, SafetensorError):
            return None  # a damaged file is recomputed

    def _write(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        draft, path = self.folder / f"{name}.new", self.folder / f"{name}.safetensors"
        copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
        copies = copies or {"empty": torch.zeros(0)}
        text = json.dumps(about)
        try:
            save_file(copies, draft, metadata={"about": text, "digest": hash_tensors(copies, text)})
            draft.replace(path)
        except (OSError, SafetensorError) as error:
            draft.unlink(missing_ok=True)
            raise OutputError(f"Cannot keep the run's state in {str(self.folder)!r}: {error}.") from None


def _known_lowerings(about: Mapping[str, Any]) -> tuple[tuple[Lowering, ...], dict[str, str]]:
    usable = tuple(
        Lowering(
            str(each["weight"]),
            tuple(int(rank) for rank in each["ranks"]),
            *(tuple(float(value) for value in each[name]) for name in ("damages", "shares")),
        )
        for each in about["usable"]
    )
    return usable, {str(path): str(reason) for path, reason in about["refused"].items()}
