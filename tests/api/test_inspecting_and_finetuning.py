"""inspect and finetune with modules that a program holds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import compress
from compress.errors import CompressError, DataError
from tests.api.test_pruning import Chain, Detector, Pair, batches, normal, seeded


def test_an_example_shows_what_could_be_compressed() -> None:
    found = compress.inspect(seeded(Chain), normal(1, 6))
    assert [layer["units"] for layer in found["layers"]] == [24, 16, 3]
    assert found["parameters"] == sum(one.numel() for one in Chain().parameters())


def test_an_example_may_be_a_mapping_of_keywords_or_a_tuple_of_arguments() -> None:
    keywords = {"image": normal(2, 1, 8, 8), "features": normal(2, 4)}
    assert len(compress.inspect(seeded(Detector), keywords)["layers"]) == 4
    assert len(compress.inspect(seeded(Pair), (normal(2, 6), normal(2, 4)))["layers"]) == 3


def test_batches_of_data_add_what_units_do_and_deep_what_they_learned() -> None:
    plain = compress.inspect(seeded(Chain), normal(2, 6))
    found = compress.inspect(seeded(Chain), data=batches(), deep=True, progress=False)
    assert set(found["layers"][0]) > set(plain["layers"][0])
    assert found["jacobian_norms"]["samples"] == 32


class Attending(nn.Module):
    """Attention by torch's fused kernel, and an activation; `cut_off`: of features that no gradient passes."""

    def __init__(self, activation: nn.Module, *, cut_off: bool = False) -> None:
        super().__init__()
        self.project, self.hidden, self.scores = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.activation, self.cut_off = activation, cut_off

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.project(tokens.detach() if self.cut_off else tokens)
        y = nn.functional.scaled_dot_product_attention(y, y, y)
        scores: torch.Tensor = self.scores(self.activation(self.hidden(y)).mean(1))
        return scores


@pytest.mark.parametrize(
    ("network", "measured"),
    [
        (Attending(nn.Tanh()), True),
        (Attending(nn.Hardsigmoid()), False),
        (Attending(nn.Tanh(), cut_off=True), False),
    ],
)
def test_a_network_without_the_derivatives_is_inspected_without_its_jacobian(
    network: nn.Module, measured: bool
) -> None:
    found = compress.inspect(network.eval(), data=[normal(40, 4, 6)], deep=True, progress=False)
    assert ("jacobian_norms" in found) == measured
    assert any("representation_cost" in layer for layer in found["layers"])


def test_inspection_changes_nothing_and_says_what_it_lacks() -> None:
    module = seeded(Chain).train()
    state = copy.deepcopy(module.state_dict())
    compress.inspect(module, normal(2, 6))
    assert module.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(ValueError, match="example"):
        compress.inspect(module)
    with pytest.raises(ValueError, match="data"):
        compress.inspect(module, normal(2, 6), deep=True)
    with pytest.raises(CompressError, match="does not run"):
        compress.inspect(module, normal(2, 7))


def labelled(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs = [normal(40, 6, seed=seed) for seed in range(count)]
    return [(one, (one[:, 0] > 0).long() + (one[:, 1] > 0).long()) for one in inputs]


def test_a_module_is_trained_on_in_a_copy_and_reloads(tmp_path: Path) -> None:
    module = seeded(Chain)
    state = copy.deepcopy(module.state_dict())
    data = labelled()

    def accuracy(network: nn.Module) -> float:
        return float(torch.cat([network(one).argmax(1) == label for one, label in data]).float().mean())

    result = compress.finetune(module, data, test=labelled(8)[6:], epochs=8, lr=0.1, evaluate=accuracy, progress=False)
    before, after = result.metrics["metric"]
    assert after > before + 0.1
    assert type(result.model) is Chain
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert result.report.evaluation is not None
    assert result.report.evaluation.samples == 80
    assert "8 epochs" in repr(result)
    again = compress.load(result.save(tmp_path / "tuned"), model=seeded(Chain))
    torch.testing.assert_close(again(data[0][0]), result.model(data[0][0]))


def test_a_pruned_network_of_two_inputs_is_trained_on() -> None:
    given = [((normal(30, 6, seed=seed), normal(30, 4, seed=seed + 9)), torch.arange(30) % 3) for seed in range(5)]
    small = compress.prune(seeded(Pair), given, keep=0.5, progress=False).model
    result = compress.finetune(small, given, epochs=1, progress=False)
    assert {name: tuple(one.shape) for name, one in result.model.state_dict().items()} == {
        name: tuple(one.shape) for name, one in small.state_dict().items()
    }
    assert result.model(*given[0][0]).shape == (30, 3)


def test_equal_trainings_give_equal_numbers() -> None:
    first, second = (compress.finetune(seeded(Chain), labelled(), epochs=1, progress=False).model for _ in range(2))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (batches(), {}, "no labels"),
        (labelled(), {"epochs": 0}, "epochs"),
        (labelled(), {"colour": "red"}, "colour"),
        ([(normal(30, 6), torch.full((30,), 7))], {}, "out of range"),
        (labelled(), {"evaluate": lambda _: 1 / 0}, "ZeroDivisionError"),
        (labelled(), {"lr": 1e5, "epochs": 3}, "learning rate"),
    ],
)
def test_bad_input_of_a_training_is_one_line(data: object, options: dict[str, object], said: str) -> None:
    with pytest.raises(CompressError, match=said) as caught:
        compress.finetune(seeded(Chain), data, progress=False, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_network_of_several_outputs_is_not_trained() -> None:
    given = [({"image": normal(24, 1, 8, 8), "features": normal(24, 4), "labels": torch.arange(24) % 3})]
    with pytest.raises(DataError, match="one tensor"):
        compress.finetune(seeded(Detector), given, progress=False)
