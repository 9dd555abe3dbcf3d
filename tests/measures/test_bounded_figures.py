"""F1, AUC and errors that a bound may be of: the values of scikit-learn, weighted samples, points and shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, mean_absolute_error, roc_auc_score

from compress.measures.figures import Figure, FigureSums, weighted_auc
from compress.measures.outputs import Output
from compress.measures.statistics import most_lost
from compress.recipe import Bound, make_recipe
from compress.recipe.files import named_code


def figures(output: Output, scores: torch.Tensor, answers: torch.Tensor, *asked: str) -> dict[str, Figure]:
    sums = FigureSums(output, asked=asked)
    for first in range(0, len(scores), 50):
        part = slice(first, first + 50)
        sums.add(scores[part], scores[part], answers[part])
    return {figure.key: figure for figure in sums.figures()}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_labels_of_yes_and_no_give_the_macro_f1_and_auc_of_scikit_learn() -> None:
    scores = draw(160, 4)
    answers = (scores + draw(160, 4, seed=1) > 0.3).long()
    found = figures(Output("output", (4,), "binary"), scores, answers)
    assert found["f1"].values[0] == pytest.approx(f1_score(answers, scores > 0, average="macro"))
    assert found["auc"].values[0] == pytest.approx(roc_auc_score(answers, scores, average="macro"))


def test_class_scores_give_them_only_where_they_are_asked_for() -> None:
    scores, answers = draw(160, 3), torch.arange(160) % 3
    output = Output("output", (3,), "classes", class_dim=1)
    assert not {"f1", "auc"} & set(figures(output, scores, answers))
    found = figures(output, scores, answers, "f1", "auc")
    assert found["f1"].values[0] == pytest.approx(f1_score(answers, scores.argmax(1), average="macro"))
    probabilities = scores.double().softmax(1)
    assert found["auc"].values[0] == pytest.approx(roc_auc_score(answers, probabilities, multi_class="ovr"))


def test_absolute_error_is_the_mean_sum_over_outputs() -> None:
    scores, answers = draw(80, 2), draw(80, 2, seed=1)
    found = figures(Output("output", (2,), "real"), scores, answers)
    assert found["absolute_error"].values[0] == pytest.approx(2 * mean_absolute_error(answers, scores))


def test_answers_that_are_all_alike_have_no_auc() -> None:
    assert "auc" not in figures(Output("output", (1,), "binary"), draw(20, 1), torch.ones(20, 1, dtype=torch.int64))


def test_a_resampled_auc_counts_samples_by_their_weights_and_ties_half() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 60).astype(float), rng.integers(0, 2, 60).astype(float)
    weights = rng.integers(0, 4, (5, 60)).astype(float)
    wanted = [roc_auc_score(labels, scores, sample_weight=row) for row in weights]
    assert weighted_auc(scores, labels, weights) == pytest.approx(wanted)


def test_a_bound_is_in_points_of_a_share_in_the_unit_of_an_error_or_a_share_of_either() -> None:
    scores, answers = draw(80, 1), draw(80, 1, seed=1)
    error = figures(Output("output", (1,), "real"), scores, answers)["squared_error"]
    share = figures(Output("output", (1,), "binary"), scores, (answers > 0).long())["accuracy"]
    assert most_lost(error, Bound(0.3)) == most_lost(share, Bound(0.3)) == 0.3
    assert most_lost(error, Bound(0.1, relative=True)) == pytest.approx(0.1 * error.values[0])
    assert most_lost(share, Bound(0.1, relative=True)) == pytest.approx(10 * share.values[0])


def test_a_percentage_is_a_relative_bound() -> None:
    recipe = make_recipe({"checkpoint": "x", "eval": "y", "max_drop": "2%", "metric": "mean-iou"})
    assert recipe.bound == Bound(0.02, relative=True)
    assert recipe.metric == "mean_iou"
    assert make_recipe(recipe.model_dump()).bound == recipe.bound


@pytest.mark.parametrize(
    "options",
    [
        {"arch": "csv:writer"},
        {"arch": "net.py:build"},
        {"metric": "compress:run"},
        {"eval": "a.py:b"},
        {"guard": ["x=m:f"]},
    ],
)
def test_no_scheme_of_data_lets_code_through_as_a_network_or_a_measure(options: dict[str, object]) -> None:
    assert named_code(options) is not None
    assert named_code({"data": "csv:x.csv", "arch": "timm:x", "guard": ["x=npz:y.npz"], "metric": "f1"}) is None
