"""Reports as a run writes them, made up: small, and as large as one is likely to get."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from compress.report import model
from compress.report.model import Counts, Measured, Point, Step
from compress.report.thumbnails import thumbnail

SPIKED = "<script>alert(1)</script>&\"'"  # must stay text wherever it turns up


def make_layer(name: str, units: int, kept: int, points: int = 200) -> model.LayerReport:
    """One layer with a falling error curve and falling spectra."""
    places = [round(step * units / (points - 1)) for step in range(points)]
    columns = [1 + round(step * (9 * units - 1) / (points - 1)) for step in range(points)]
    return model.LayerReport(
        name, units, kept,
        facts=model.Facts(
            dead=1, duplicates=0, rank_features=units // 2, rank_outputs=3, bound=3 * (units // 2),
            bound_text=f"rank(Φ) = {units // 2} and rank(Ψ) = 3",
            spectra=model.Spectra(
                1e-3,
                tuple(Point(place, math.exp(-12 * place / columns[-1])) for place in columns),
                tuple(Point(place, math.exp(-9 * place / columns[-1])) for place in columns),
            ),
        ),
        widths=model.WidthErrors(
            tuple(Point(place, math.exp(-4 * place / units)) for place in places),
            (Point(units // 2, 0.15), Point(kept, 0.1), Point(units, 0.02)),
        ),
        fit=model.Fit(0.08, 0.1, 0.0, 5000, "all"),
        certificate=model.Certificate("smallest Σc‖v‖", 1e-3, 1.0, 3.2, 1e-8, kept, "certified"),
        seconds={"recording": 1.0},
    )  # fmt: skip


def make_search(layers: tuple[model.LayerReport, ...]) -> model.SearchReport:
    """A search that made two networks."""
    score = model.CalibrationFigures(
        100, 0.5, 0.2, 0.98, Measured(0.9, 0.895), Measured(0.3, 0.31), 0.012, {"output": 0.012}
    )
    return model.SearchReport(
        trials=(model.Trial(0.01, {"macs": 0.4}, 0, score), model.Trial(0.003, {"macs": 0.6}, 2, score)),
        predicted_costs={"macs": 0.6},
        layers={
            layer.name: model.LayerSearch(layer.kept, 1e-3, (Step(layer.kept, 1.1e-3), Step(1, 0.2)), (1.0, 0.5))
            for layer in layers
        },
    )


def make_report(layers: int = 3, classes: int = 4, side: int = 8) -> model.RunReport:
    """A report with that many layers and classes, its worst disagreements shown as square images of `side` pixels."""
    generator = torch.Generator().manual_seed(0)
    made = tuple(make_layer(f"f.{place}{SPIKED}", 16 * (1 + place % 8), 8 * (1 + place % 8)) for place in range(layers))
    return model.RunReport(
        model.Inputs(
            model.SourceFile(f"net{SPIKED}.pt", "ab" * 32, "float32"),
            model.ArchitectureUsed("compress:mlp", {"widths": [4, 6, 3]}, (3, side, side)),
            model.DataUsed(
                model.Samples("a.npz", 900, "cd" * 16, held_back=100), model.Samples("b.npz", 1000, "ef" * 16)
            ),
            0,
            {"python": "3.12", "torch": "2.9", "compress-networks": "0.1.0"},
        ),
        recipe={"checkpoint": f"net{SPIKED}.pt", "keep": 0.5, "max_drop": 1.0},
        rule="keep 0.5 of the units",
        layers=made,
        skipped=(model.SkippedLayer("head", classes, f"it is an output of the network {SPIKED}"),),
        cost=model.CostReport(
            Counts(1_000_000, 250_000), Counts(4_000_000, 1_000_000), Counts(4_000_000, 1_000_000),
            (model.Latency(64, 1, "cpu", 4.0, 2.0),),
        ),
        verification=model.Verification(1e-7, 0.0),
        search=make_search(made),
        evaluation=model.EvaluationReport(
            1000, model.Scores(0.3, 0.9), model.Scores(0.31, 0.895), 0.5, 0.97, 0.1,
            figures=(
                model.FigureReport(
                    "top1", "output", 0.9, 0.895,
                    model.FigureChange(0.5, (-0.2, 1.3), 1.1, 0.95, "Tango's score interval", model.Flips(9, 4), 0.27),
                ),
            ),
            outputs=(model.OutputReport(f"boxes{SPIKED}", "real", "squares", "no labels", 2.0, 0.01, 0.1),),
            per_class=tuple(
                model.ClassScore(label, 10, 0.9, max(0.0, 0.9 - 0.001 * label), model.Flips(1, 0), (-9.0, 30.0))
                for label in range(classes)
            ),
            class_names=tuple(f"class {label} {SPIKED}" for label in range(classes)),
            changes=(model.ClassChange(0, 1, 12), model.ClassChange(1, 0, 5)),
            disagreements=tuple(
                model.DisagreementReport(
                    7 * place, 0, 0, 1, Measured(0.9, 0.8), 0.7,
                    thumbnail(torch.rand(3, side, side, generator=generator)),
                )
                for place in range(12)
            ),
        ),
        hashes={"model.safetensors": "12" * 32},
        notes=(f"a note {SPIKED}",),
        order=(*(layer.name for layer in made), "head"),
        modules=tuple(
            model.ModuleCost(layer.name, Counts(1000 * layer.units, 500 * layer.units), Counts(900, 450))
            for layer in made
        ),
        seconds={"prepare": 1.0},
    )  # fmt: skip


def make_small_report() -> model.RunReport:
    """A report with one of everything, and little of it."""
    report = make_report(classes=2, side=4)
    layers = (make_layer("a", 8, 4, points=3),)
    evaluation = report.evaluation
    assert evaluation is not None
    return replace(
        report,
        layers=layers,
        search=make_search(layers),
        evaluation=replace(evaluation, disagreements=evaluation.disagreements[:1]),
        finetune=model.TuningReport("distillation", 4, 2, evaluation, divergences=(Step(0, 0.1), Step(2, 0.05))),
        gates=(model.Check("a", "b", "c", True, "d"),),
        exports=(model.ExportReport("onnx", "f", "w", (model.ExportCheck(1, 0.0),), "ab", 3),),
    )
