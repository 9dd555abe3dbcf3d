"""Evaluation: both networks on the same samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.data import Batch
from compress.errors import DataError, NonFiniteError
from compress.measures.outputs import Output
from compress.report.evaluation import Evaluation, evaluate_networks, network_outputs


class Fixed(nn.Module):
    """Returns the rows of a table that the inputs number."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, numbers: Tensor) -> Tensor:
        return self.table[numbers.long()[:, 0]]


def batches(labels: Tensor | None, count: int, size: int = 7) -> list[Batch]:
    numbers = torch.arange(count, dtype=torch.float32)[:, None]
    return [
        Batch(numbers[first : first + size], None if labels is None else labels[first : first + size])
        for first in range(0, count, size)
    ]


def evaluate(first: Tensor, second: Tensor, labels: Tensor | None) -> Evaluation:
    """The rows of two tables as outputs of two networks that give class scores."""
    outputs = (Output("output", (first.shape[1],), "classes", class_dim=1),)
    answered = "" if labels is None else "output"
    return evaluate_networks(Fixed(first), Fixed(second), batches(labels, len(first)), outputs, answered)


def tables(classes: int = 25, count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(count, classes, generator=generator)
    second = first + 0.7 * torch.randn(count, classes, generator=generator)
    return first, second, torch.randint(classes, (count,), generator=generator)


def test_scores_are_those_of_the_whole_table_at_once() -> None:
    first, second, labels = tables()
    found = evaluate(first, second, labels)
    for score, table in ((found.original, first), (found.compressed, second)):
        assert score is not None
        assert score.top1 == pytest.approx(float((table.argmax(1) == labels).double().mean()))
        assert score.top5 == pytest.approx(float((table.topk(5).indices == labels[:, None]).any(1).double().mean()))
        assert score.loss == pytest.approx(float(functional.cross_entropy(table, labels)), rel=1e-5)
    assert found.agreement == pytest.approx(float((first.argmax(1) == second.argmax(1)).double().mean()))
    assert found.relative_output_change == pytest.approx(float((second - first).norm() / first.norm()), rel=1e-5)
    assert sum(count for count, *_ in found.per_class.values()) == 40


def test_without_labels_only_the_comparison_is_left() -> None:
    first, second, _ = tables()
    found = evaluate(first, second, None)
    assert found.original is None
    assert found.drop is None
    assert 0 < found.agreement < 1


def test_top5_needs_twenty_classes() -> None:
    first, second, labels = tables(classes=19)
    found = evaluate(first, second, labels)
    assert found.original is not None
    assert found.original.top5 is None


def test_no_samples_are_a_data_fault() -> None:
    first, second, _ = tables()
    with pytest.raises(DataError, match="no samples"):
        evaluate_networks(Fixed(first), Fixed(second), [], (Output("output", (25,), "classes", class_dim=1),))


def test_labels_out_of_range_are_a_data_fault() -> None:
    first, second, labels = tables()
    with pytest.raises(DataError, match="25 classes; got 25"):
        evaluate(first, second, labels.clamp_min(25))


def test_a_nan_output_is_named() -> None:
    with pytest.raises(NonFiniteError, match="Fixed"):
        network_outputs(Fixed(torch.full((3, 2), float("nan"))), (torch.zeros(3, 1),))


def test_the_worst_disagreements_come_first_and_are_those_of_the_whole_table() -> None:
    first, second, labels = tables(classes=4, count=200)
    found = evaluate(first, second, labels)
    before, after = first.argmax(1), second.argmax(1)
    rows = torch.arange(200)
    lost = first.double().softmax(1)[rows, before] - second.double().softmax(1)[rows, before]
    lost[before == after] = -torch.inf
    expected = lost.argsort(descending=True)[: len(found.disagreements)].tolist()
    assert [one.index for one in found.disagreements] == expected
    assert [one.label for one in found.disagreements] == labels[expected].tolist()
    assert all(float(one.inputs[0]) == one.index for one in found.disagreements)


def test_the_changes_of_a_prediction_are_counted_by_pair() -> None:
    first, second, labels = tables(classes=4, count=200)
    found = evaluate(first, second, labels)
    pairs = list(zip(first.argmax(1).tolist(), second.argmax(1).tolist(), strict=True))
    assert {(was, now): count for was, now, count in found.changes} == {
        pair: pairs.count(pair) for pair in set(pairs) if pair[0] != pair[1]
    }
