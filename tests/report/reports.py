"""Reports as a run writes them, made up: small, and as large as one is likely to get."""

from __future__ import annotations

import math
from typing import Any

import torch

from compress.report.thumbnails import thumbnail

SPIKED = "<script>alert(1)</script>&\"'"  # must stay text wherever it turns up


def make_layer(name: str, units: int, kept: int, points: int = 200) -> dict[str, Any]:
    """One layer with a falling error curve and falling spectra."""
    places = [round(step * units / (points - 1)) for step in range(points)]
    columns = [1 + round(step * (9 * units - 1) / (points - 1)) for step in range(points)]
    return {
        "name": name, "units": units, "kept": kept, "dead": 1, "duplicates": 0,
        "rank_features": units // 2, "rank_outputs": 3, "bound": 3 * (units // 2),
        "bound_text": f"rank(Φ) = {units // 2} and rank(Ψ) = 3",
        "spectra": {
            "tolerance": 1e-3,
            "features": [[place, math.exp(-12 * place / columns[-1])] for place in columns],
            "outputs": [[place, math.exp(-9 * place / columns[-1])] for place in columns],
        },
        "curve": [[place, math.exp(-4 * place / units)] for place in places],
        "held_back_curve": [[units // 2, 0.15], [kept, 0.1], [units, 0.02]],
        "error": 0.08, "held_back_error": 0.1, "inherited_error": 0.0, "rows": 5000, "sampling": "all",
        "lasso": {
            "form": "smallest Σc‖v‖", "penalty": 1e-3, "silencing_penalty": 1.0, "objective": 3.2,
            "relative_duality_gap": 1e-8, "active_units": kept, "status": "certified",
        },
        "seconds": {"recording": 1.0},
    }  # fmt: skip


def make_report(layers: int = 3, classes: int = 4, side: int = 8) -> dict[str, Any]:
    """A report with that many layers and classes, its worst disagreements shown as square images of `side` pixels."""
    generator = torch.Generator().manual_seed(0)
    return {
        "checkpoint": {"file": f"net{SPIKED}.pt", "sha256": "ab" * 32, "dtype": "float32"},
        "architecture": {"spec": "compress:mlp", "arguments": {"widths": [4, 6, 3]}, "input_shape": [3, side, side]},
        "data": {
            "calibration": {"source": "a.npz", "samples": 900, "held_back": 100, "fingerprint": "cd" * 16},
            "evaluation": {"source": "b.npz", "samples": 1000, "fingerprint": "ef" * 16, "overlap": 0},
            "preprocessing": None,
        },
        "recipe": {"checkpoint": f"net{SPIKED}.pt", "keep": 0.5, "max_drop": 1.0},
        "rule": "keep 0.5 of the units",
        "seed": 0,
        "layers": [
            *(make_layer(f"f.{place}{SPIKED}", 16 * (1 + place % 8), 8 * (1 + place % 8)) for place in range(layers)),
            {"name": "head", "units": classes, "skipped": f"it is an output of the network {SPIKED}"},
        ],
        "cost": {
            "parameters": [1_000_000, 250_000], "macs": [4_000_000, 1_000_000], "bytes": [4_000_000, 1_000_000],
            "latency": [{"batch_size": 64, "threads": 1, "device": "cpu", "before_ms": 4.0, "after_ms": 2.0}],
        },
        "evaluation": {
            "samples": 1000,
            "original": {"top1": 0.9, "loss": 0.3}, "compressed": {"top1": 0.895, "loss": 0.31},
            "drop_points": 0.5, "agreement": 0.97, "relative_output_change": 0.1,
            "per_class": {
                str(label): {"samples": 10, "original": 0.9, "compressed": 0.9 - 0.001 * label}
                for label in range(classes)
            },
            "class_names": [f"class {label} {SPIKED}" for label in range(classes)],
            "changes": [[0, 1, 12], [1, 0, 5]],
            "disagreements": [
                {
                    "index": 7 * place, "label": 0, "original": 0, "compressed": 1,
                    "probabilities": [0.9, 0.8], "lost": 0.7,
                    "thumbnail": thumbnail(torch.rand(3, side, side, generator=generator)),
                }
                for place in range(12)
            ],
        },
        "verification": {"narrowed_deviation": 1e-7, "reload_deviation": 0.0},
        "hashes": {"model.safetensors": "12" * 32},
        "notes": [f"a note {SPIKED}"],
        "versions": {"python": "3.12", "torch": "2.9", "compress-networks": "0.1.0"},
        "seconds": {"prepare": 1.0},
    }  # fmt: skip
