"""Names of outputs, what they are, and how far they lie apart."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from compress.data import DataSource, open_data
from compress.errors import DataError, NonFiniteError, RecipeError, TraceError
from compress.measures.kinds import Hints, describe_outputs, need_place
from compress.measures.outputs import (
    Distances,
    Kind,
    Output,
    Spread,
    check_finite,
    largest_deviation,
    named_outputs,
    read_described,
)

Pair = namedtuple("Pair", ["left", "right"])
GENERATOR = torch.Generator().manual_seed(0)


@dataclass
class Found:
    boxes: Tensor
    more: tuple[Tensor, Tensor]
    text: str = ""


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (noise(2), ["output"]),
        ((noise(2), noise(3)), ["0", "1"]),
        ({"boxes": noise(2), "scores": [noise(1), noise(1)]}, ["boxes", "scores.0", "scores.1"]),
        (Found(noise(2), (noise(1), noise(3))), ["boxes", "more.0", "more.1"]),
        (Pair(noise(1), {"a": noise(2)}), ["left", "right.a"]),
        (OrderedDict(logits=noise(2), loss=None), ["logits"]),
    ],
)
def test_every_tensor_has_the_path_that_leads_to_it(returned: Any, names: list[str]) -> None:
    assert list(named_outputs(returned)) == names


def test_names_stay_apart_where_keys_hold_dots() -> None:
    assert len(named_outputs({"a.b": noise(1), "a": {"b": noise(2)}})) == 2


def test_caches_are_no_output_and_nothing_at_all_is_refused() -> None:
    class DynamicCache(tuple):  # type: ignore[type-arg]
        """As transformers calls its own."""

    assert list(named_outputs((noise(2), DynamicCache((noise(3),))))) == ["0"]
    with pytest.raises(TraceError, match="a tensor, or a container"):
        named_outputs({"a": 1})


@pytest.mark.parametrize(("shape", "dim"), [((5, 4), 1), ((5, 3, 6, 7), 1), ((5, 6, 3), 2)])
def test_class_scores_are_held_apart_by_the_divergence_of_their_distributions(shape: tuple[int, ...], dim: int) -> None:
    before, after = noise(*shape), noise(*shape)
    output = Output("output", shape[1:], "classes", class_dim=dim)
    first, second = (Categorical(logits=scores.double().movedim(dim, -1)) for scores in (before, after))
    expected = kl_divergence(first, second).reshape(5, -1).mean(1)
    torch.testing.assert_close(output.distances(before, after, 5), expected)
    chances = Output("output", shape[1:], "classes", class_dim=dim, probabilities=True)
    found = chances.distances(before.double().softmax(dim), after.double().softmax(dim), 5)
    torch.testing.assert_close(found, expected)


def test_yes_and_no_are_held_apart_by_the_divergence_of_theirs() -> None:
    before, after = noise(6, 3), noise(6, 3)
    first, second = (Bernoulli(logits=scores.double()) for scores in (before, after))
    expected = kl_divergence(first, second).mean(1)
    torch.testing.assert_close(Output("a", (3,), "binary").distances(before, after, 6), expected)
    chances = Output("a", (3,), "binary", probabilities=True)
    found = chances.distances(before.double().sigmoid(), after.double().sigmoid(), 6)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_an_outputs_scale_does_not_change_its_share(shift: float) -> None:
    """Numbers are held against how much they vary, so neither a unit nor an offset changes what counts."""
    outputs = (Output("a", (3,), "real"), Output("b", (3,), "real"))
    before = {name: noise(40, 3).double() for name in ("a", "b")}
    after = {name: value + 0.1 * noise(40, 3) for name, value in before.items()}

    def measured(factor: float) -> dict[str, float]:
        sums = Distances(outputs)
        moved = [{**each, "b": factor * each["b"] + shift} for each in (before, after)]
        for part in (slice(0, 15), slice(15, 40)):
            first, second = ({name: value[part] for name, value in each.items()} for each in moved)
            sums.start(first, len(first["a"]))
            sums.add(0, first, second, len(first["a"]))
        return sums.means()[0]

    assert measured(1.0) == pytest.approx(measured(1e4), rel=1e-6)
    assert measured(1.0)["b"] == pytest.approx(0.01, rel=0.5)


def test_a_spread_is_the_variance_of_everything_that_was_added() -> None:
    spread, values = Spread(), noise(30, 4).double()
    for part in values.split(7):
        spread.add(part, len(part))
    assert spread.scale == pytest.approx(float(values.var(0, unbiased=False).sum()))


def test_similarities_of_each_sample_with_each_have_a_spread_over_batches_of_several_sizes() -> None:
    spread, sizes = Spread(), (6, 6, 4)
    batches = [noise(size, size).double() for size in sizes]
    for values in batches:
        spread.add(values, len(values))
    energy = sum(float(values.square().sum()) for values in batches)
    sums = [batches[0].sum(0) + batches[1].sum(0), batches[2].sum(0)]
    means = float(sums[0].square().sum()) / 12 + float(sums[1].square().sum()) / 4
    assert spread.scale == pytest.approx((energy - means) / 16)


def test_samples_along_another_dimension_are_told_apart() -> None:
    before, after = noise(5, 4, 3), noise(5, 4, 3)  # (time, batch, classes)
    hints = Hints(sample_dims={"logits": 1})
    (behind,) = describe_outputs({"logits": before}, 4, (), hints)
    (first,) = describe_outputs({"logits": before.movedim(1, 0)}, 4, (), Hints())
    assert (behind.shape, behind.kind, behind.sample_dim, first.sample_dim) == ((5, 3), "classes", 1, 0)
    moved = behind.distances(before, after, 4)
    torch.testing.assert_close(moved, first.distances(before.movedim(1, 0), after.movedim(1, 0), 4))
    again = read_described([behind.as_report()])
    assert describe_outputs({"logits": before}, 4, (), Hints(known=again))[0].sample_dim == 1


def test_the_share_of_whole_numbers_that_differ_is_their_distance() -> None:
    output = Output("ids", (4,), "whole")
    before = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    after = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0]])
    assert output.distances(before, after, 2).tolist() == [0.0, 0.5]


def test_the_worst_output_is_named() -> None:
    expected = {"a": noise(3), "b": noise(3)}
    deviation, where = largest_deviation(expected, {"a": expected["a"], "b": expected["b"] * 1.5})
    assert (where, deviation) == ("b", pytest.approx(0.5))
    assert largest_deviation(expected, {"a": expected["a"]})[0] == float("inf")
    assert largest_deviation(expected, {**expected, "b": noise(4)})[0] == float("inf")
    with pytest.raises(NonFiniteError, match="`b`"):
        check_finite({"a": noise(1), "b": torch.tensor([torch.nan])}, "net")


def source(tmp_path: Path, **arrays: np.ndarray) -> DataSource:
    count = len(next(iter(arrays.values())))
    np.savez(tmp_path / "data.npz", inputs=np.zeros((count, 2), np.float32), **arrays)
    return open_data(str(tmp_path / "data.npz"))


WHOLE = np.arange(12) % 3
MASKS = np.arange(12 * 4 * 5).reshape(12, 4, 5) % 3
TOKENS = np.arange(12 * 6).reshape(12, 6) % 7


@pytest.mark.parametrize(
    ("shape", "arrays", "kind", "class_dim"),
    [
        ((3,), {"labels": WHOLE}, "classes", 1),
        ((3, 4, 5), {"labels": MASKS}, "classes", 1),
        ((4, 5, 3), {"labels": MASKS}, "classes", 3),
        ((3, 4, 5), {"labels": np.where(MASKS == 2, 255, MASKS)}, "classes", 1),
        ((6, 7), {"labels": TOKENS}, "classes", 2),
        ((7, 6), {"labels": TOKENS}, "classes", 1),
        ((6, 7), {"labels": np.where(TOKENS == 2, -100, TOKENS)}, "classes", 2),
        ((), {"labels": WHOLE % 2}, "binary", None),
        ((1,), {"labels": (WHOLE % 2).astype(np.float32)}, "binary", None),
        ((6,), {"labels": TOKENS % 2}, "binary", None),
        ((1, 4, 5), {"labels": MASKS % 2}, "binary", None),
        ((3,), {"targets": np.ones((12, 3))}, "real", None),
        ((), {"targets": np.ones(12)}, "real", None),
    ],
)
def test_labels_and_targets_say_what_an_output_is(
    tmp_path: Path, shape: tuple[int, ...], arrays: dict[str, np.ndarray], kind: str, class_dim: int | None
) -> None:
    tensors = {"first": noise(2, 11, 11, 11), "second": noise(2, *shape)}
    (first, second) = describe_outputs(tensors, 2, (source(tmp_path, **arrays),), Hints())
    assert (first.kind, second.kind, second.class_dim) == ("real", kind, class_dim)


def test_labels_that_fit_no_output_are_refused_with_the_shapes(tmp_path: Path) -> None:
    data = source(tmp_path, labels=MASKS)
    outputs = describe_outputs({"output": noise(2, 3)}, 2, (data,), Hints())
    with pytest.raises(DataError, match=r"\(N, 4, 5\) up to 2, which fit no output .* `output` \(N, 3\)"):
        need_place(outputs, data)


@pytest.mark.parametrize(
    ("tensors", "hints", "kind"),
    [
        ({"output": noise(2, 5)}, Hints(), "real"),
        ({"output": noise(2, 5).softmax(1)}, Hints(), "classes"),
        ({"output": noise(2, 5).log_softmax(1)}, Hints(), "classes"),
        ({"output": noise(2, 5)}, Hints("torchvision:vgg11"), "classes"),
        ({"output": noise(2, 5)}, Hints(class_counts=(5,)), "classes"),
        ({"output": noise(2, 5)}, Hints(class_counts=(7,)), "real"),
        ({"logits": noise(2, 5)}, Hints(), "classes"),
        ({"boxes": noise(2, 5), "other": noise(2, 3)}, Hints("timm:some", (5,)), "real"),
        ({"output": torch.ones(2, 5, dtype=torch.int64)}, Hints("timm:some"), "whole"),
    ],
)
def test_without_labels_only_the_evident_is_class_scores(tensors: dict[str, Tensor], hints: Hints, kind: str) -> None:
    assert describe_outputs(tensors, 2, (None,), hints)[0].kind == kind


def test_an_output_of_weight_nothing_is_left_out_and_an_unknown_one_refused() -> None:
    tensors = {"a": noise(2, 3), "b": noise(2, 3)}
    (only,) = describe_outputs(tensors, 2, (), Hints(), {"a": 0, "b": 2})
    assert (only.name, only.weight) == ("b", 2)
    with pytest.raises(RecipeError, match="'c' is no output; there are a, b"):
        describe_outputs(tensors, 2, (), Hints(), {"c": 1})
    with pytest.raises(RecipeError, match="every output has weight 0"):
        describe_outputs(tensors, 2, (), Hints(), {"a": 0, "b": 0})


def test_what_a_manifest_says_of_outputs_is_read_back_or_refused() -> None:
    rows = [Output("a", (3, 4), "classes", class_dim=2).as_report(), Output("b", (), "real").as_report()]
    assert list(read_described(rows)) == ["a", "b"]
    for fault in ({"kind": "x"}, {"class_dim": 9}, {"weight": -1}, {"shape": "3"}, {"name": 1}):
        with pytest.raises(ValueError, match="outputs"):
            read_described([{**rows[0], **fault}])


@pytest.mark.parametrize("kind", ["classes", "binary", "real"])
def test_scores_masked_out_of_both_outputs_do_not_count(kind: Kind) -> None:
    output = Output("scores", (4,), kind, class_dim=1 if kind == "classes" else None)
    before, after = noise(6, 4), noise(6, 4)
    masked = torch.tensor([False, True, False, False])
    moved = output.distances(before.masked_fill(masked, -torch.inf), after.masked_fill(masked, -torch.inf), 6)
    shown = replace(output, shape=(3,)).distances(before[:, ~masked], after[:, ~masked], 6)
    torch.testing.assert_close(moved * (4 / 3 if kind == "binary" else 1), shown)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_other_infinities_pass(value: float) -> None:
    scores = noise(6, 4)
    scores[2, 1] = -torch.inf
    check_finite({"scores": scores}, "the network")
    for bad in (scores.where(scores.isfinite(), value), torch.full((6, 4), -torch.inf)):
        with pytest.raises(NonFiniteError):
            check_finite({"scores": bad}, "the network")
