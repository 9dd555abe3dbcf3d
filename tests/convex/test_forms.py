"""Path, tolerance, exact form, unit count, width bound."""

import math

import pytest
import torch

from compress.convex import (
    Moments,
    MultitaskLasso,
    Status,
    penalty_grid,
    reduce_width,
    solve,
    solve_exact,
    solve_path,
    solve_tolerance,
    solve_unit_count,
    width_bound,
)
from compress.convex.lasso import unit_norms
from tests.convex.problems import KINDS, normal, problem_of_kind


def test_every_point_of_a_path_is_certified_and_equals_its_cold_solution():
    problem = problem_of_kind("conv groups")
    grid = penalty_grid(problem.moments, 8, 1e-3, problem.unit_costs)
    for solution in solve_path(problem.moments, grid, problem.unit_costs):
        assert solution.certified
        cold = solve(MultitaskLasso(problem.moments, solution.penalty, problem.unit_costs))
        assert solution.objective == pytest.approx(cold.objective, rel=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [0.7, 0.35])
def test_the_tolerance_form_meets_its_error_at_least_norm(kind, error):
    problem = problem_of_kind(kind)
    solution = solve_tolerance(problem.moments, error, problem.unit_costs)
    if solution.status is Status.INFEASIBLE:
        assert solution.error > error
        return
    assert solution.certified, solution.message
    assert solution.error <= error * (1 + 1e-9)
    # independent dual bound: any u with ‖Φ_kᵀu‖ ≤ c_k gives ⟨u, Ψ⟩ − ε‖Ψ‖‖u‖; the residual, scaled, is such a u
    moments, v = problem.moments, solution.coefficients
    correlation = moments.cross - moments.gram @ v
    alpha = float((problem.costs / unit_norms(correlation, moments.group_size)).min())
    residual = moments.energy - 2 * float((v * moments.cross).sum()) + float((v * (moments.gram @ v)).sum())
    with_outputs = moments.energy - float((v * moments.cross).sum())  # ⟨R, Ψ⟩/N
    dual = alpha * (with_outputs - error * (moments.energy * residual) ** 0.5)
    assert solution.objective - dual <= 2e-6 * solution.objective


def test_an_error_that_no_weights_reach_is_called_infeasible():
    problem = problem_of_kind("well-posed")
    solution = solve_tolerance(problem.moments, 1e-6, problem.unit_costs)
    assert solution.status is Status.INFEASIBLE


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 2])
def test_the_exact_form_reproduces_the_outputs_at_least_norm(seed, size):
    generator = torch.Generator().manual_seed(seed)
    features = normal(generator, 12, 40 * size)
    outputs = normal(generator, 12, 3)
    solution = solve_exact(Moments.of(features, outputs, group_size=size))
    assert solution.certified, solution.message
    assert float((features @ solution.coefficients - outputs).norm() / outputs.norm()) < 1e-6
    # the least-squares weights of least Frobenius norm reproduce Ψ too, at no smaller Σ‖v_k‖
    other = torch.linalg.pinv(features) @ outputs
    assert solution.objective <= float(unit_norms(other, size).sum())
    near = solve(MultitaskLasso(Moments.of(features, outputs, group_size=size), 1e-5))
    assert float(unit_norms(near.coefficients, size).sum()) == pytest.approx(solution.objective, rel=1e-3)


def relu_problem(seed, rows, units, outputs, inputs, *, of_features=True):
    """ReLU features of few inputs, whose singular values fall fast, and outputs of them or of nothing."""
    generator = torch.Generator().manual_seed(seed)
    features = (normal(generator, rows, inputs) @ normal(generator, inputs, units) / inputs**0.5).relu()
    if of_features:
        return features, features @ normal(generator, units, outputs)
    return features, normal(generator, rows, outputs)


@pytest.mark.parametrize("outputs", [1, 2, 3, 10])
@pytest.mark.parametrize(("rows", "units", "inputs"), [(40, 100, 8), (40, 100, 64), (200, 120, 16), (60, 80, 16)])
@pytest.mark.parametrize("of_features", [True, False])
def test_the_exact_form_of_relu_features_ends_certified(outputs, rows, units, inputs, of_features):
    features, targets = relu_problem(outputs, rows, units, outputs, inputs, of_features=of_features)
    moments = Moments.of(features, targets)
    solution = solve_exact(moments, tolerance=1e-5)
    assert solution.certified, solution.message
    weights = torch.linalg.lstsq(features, targets, driver="gelsd").solution
    reached = features @ solution.coefficients - features @ weights
    assert float(reached.norm() / targets.norm()) < 1e-6
    assert solution.objective <= float(unit_norms(weights, 1).sum()) * (1 + 1e-9)
    rank = min(rows, units)
    assert solution.active.numel() <= rank * min(rank, outputs)


@pytest.mark.parametrize(("rank", "outputs"), [(3, 1), (5, 1), (4, 2)])
def test_ties_of_the_exact_form_end_at_the_width_bound(rank, outputs):
    generator = torch.Generator().manual_seed(rank)
    basis = normal(generator, 30, rank).abs()
    features = basis @ torch.rand(rank, 24, generator=generator, dtype=torch.float64)
    costs = torch.ones(rank, dtype=torch.float64) @ torch.linalg.lstsq(basis, features).solution  # every V ≥ 0 ties
    targets = features @ torch.rand(24, outputs, generator=generator, dtype=torch.float64)
    solution = solve_exact(Moments.of(features, targets), costs)
    assert solution.certified, solution.message
    assert solution.active.numel() <= rank * min(rank, outputs)


def test_a_time_limit_gives_the_best_point_so_far_with_its_true_gap():
    features, targets = relu_problem(0, 60, 150, 1, 16)
    moments = Moments.of(features, targets)
    noisy = Moments.of(*relu_problem(0, 200, 40, 3, 16, of_features=False))
    for solution in (
        solve_exact(moments, time_limit=0.0),
        solve_tolerance(noisy, 0.95, time_limit=0.0),
        solve_unit_count(moments, 30, time_limit=0.0),
    ):
        assert solution.status is Status.STOPPED
        assert "time limit" in solution.message
        assert solution.gap > 1e-6 or solution.active.numel() == 0  # V = 0 is the solution of the largest λ


@pytest.mark.parametrize("spread", [1e2, 1e6])
def test_unit_costs_of_any_spread_do_not_make_a_reachable_error_infeasible(spread):
    features, targets = relu_problem(1, 200, 40, 3, 16)
    costs = torch.logspace(0, 1, 40, base=spread, dtype=torch.float64)
    solution = solve_tolerance(Moments.of(features, targets).centred(), 1e-2, costs)
    assert solution.certified, solution.message
    assert solution.error <= 1e-2 * (1 + 1e-9)


def test_an_error_below_least_squares_is_called_infeasible_with_the_least_one():
    features, targets = relu_problem(2, 200, 40, 3, 16, of_features=False)
    moments = Moments.of(features, targets)
    solution = solve_tolerance(moments, 0.1)
    least = targets - features @ torch.linalg.lstsq(features, targets).solution
    assert solution.status is Status.INFEASIBLE
    assert solution.error == pytest.approx(float(least.norm() / targets.norm()), rel=1e-9)
    assert solution.gap == float("inf")
    assert "smallest relative error" in solution.message


def test_a_solution_predicts_with_its_intercept():
    features, targets = relu_problem(3, 200, 20, 3, 8)
    moments = Moments.of(features + 5, targets - 3).centred()
    solution = solve_tolerance(moments, 1e-6)
    predicted = solution.predict((features + 5).numpy())
    assert float((predicted - (targets - 3)).norm() / targets.norm()) < 1e-5
    assert repr(solution).count("\n") == 0
    with pytest.raises(ValueError, match="columns"):
        solution.predict(features[:, 1:])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: solve(MultitaskLasso(m, 0.0)), "solve_exact"),
        (lambda m: solve(MultitaskLasso(m, 1.0), tolerance=-1), "tolerance"),
        (lambda m: solve_tolerance(m, float("nan")), "error"),
        (lambda m: solve_tolerance(m, 0.1, tolerance=0), "tolerance"),
        (lambda m: solve_unit_count(m, 99), "units"),
        (lambda m: solve_exact(m, range_tolerance=2), "range_tolerance"),
        (lambda m: solve_exact(m, [1.0, 2.0]), "unit_costs"),
    ],
)
def test_misuse_gets_one_sentence(call, said):
    with pytest.raises(ValueError, match=said):
        call(problem_of_kind("well-posed").moments)


@pytest.mark.parametrize("wanted", [0, 1, 3, 6, 11])
def test_a_wanted_number_of_units_is_found(wanted):
    problem = problem_of_kind("well-posed", seed=2)
    solution = solve_unit_count(problem.moments, wanted, problem.unit_costs)
    assert solution.active.numel() == wanted
    assert solution.certified


def test_a_bound_that_promises_nothing_says_so():
    generator = torch.Generator().manual_seed(0)
    features = normal(generator, 100, 20)
    bound = width_bound(Moments.of(features, features @ normal(generator, 20, 8)))
    assert (bound.rank_features, bound.rank_outputs, bound.bound) == (20, 8, 160)
    assert bound.vacuous
    assert "says nothing" in bound.message


def test_the_bound_is_stated_where_it_helps_with_the_rank_beside_it():
    generator = torch.Generator().manual_seed(0)
    features = normal(generator, 100, 4) @ normal(generator, 4, 50)
    outputs = features @ normal(generator, 50, 2) @ normal(generator, 2, 6)
    for moments in (Moments.of(features, outputs), Moments.of(features, outputs, output_gram=False)):
        bound = width_bound(moments)
        assert (bound.bound, bound.vacuous, bound.rank_bound) == (8, False, 4)
        assert "at most 8 of 50" in bound.message
        assert "4 units already span" in bound.message


@pytest.mark.parametrize("batch", range(10))
def test_the_width_theorem_holds_on_rank_deficient_problems(batch):
    for seed in range(batch * 20, batch * 20 + 20):
        generator = torch.Generator().manual_seed(seed)
        rank, q, size = 1 + seed % 6, 1 + seed % 3, 1 + (seed % 4 == 0)
        units, outputs = 40 + seed % 30, q + seed % 4
        features = normal(generator, 50, rank) @ normal(generator, rank, units * size)
        weights = (
            normal(generator, units * size, outputs) @ normal(generator, outputs, q) @ normal(generator, q, outputs)
        )
        costs = 0.1 + torch.rand(units, generator=generator, dtype=torch.float64)
        reduced = reduce_width(Moments.of(features, features @ weights, group_size=size), weights, costs)
        norms = unit_norms(reduced, size)
        assert int((norms > 0).sum()) <= rank * min(rank, q, outputs)
        assert float((features @ (reduced - weights)).norm() / (features @ weights).norm()) < 1e-8
        assert float((costs * norms).sum()) <= float((costs * unit_norms(weights, size)).sum()) * (1 + 1e-12)


def test_reducing_an_exact_solution_keeps_its_objective():
    generator = torch.Generator().manual_seed(1)
    features = normal(generator, 30, 3) @ normal(generator, 3, 40)
    moments = Moments.of(features, features @ normal(generator, 40, 2))
    solution = solve_exact(moments)
    reduced = reduce_width(moments, solution.coefficients)
    norms = unit_norms(reduced, 1)
    assert int((norms > 0).sum()) <= 6
    assert float(norms.sum()) == pytest.approx(solution.objective, rel=1e-5)


def test_the_search_for_a_unit_count_ends_where_rounding_hides_the_units() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.rand(72, 1, generator=generator, dtype=torch.float64)
    scales = torch.tensor([4e9, 6.8e10, 5.8e10, 2.8e10], dtype=torch.float64)
    large = shared * scales + 1e3 * torch.randn(72, 4, generator=generator, dtype=torch.float64)
    small = 1e-3 * torch.rand(72, 1, generator=generator, dtype=torch.float64)
    features = torch.cat([large, small], 1).float()
    moments = Moments.of(features, features @ torch.randn(5, 6, generator=generator))
    solution = solve_unit_count(moments, 3)
    assert solution.status is Status.STOPPED
    assert "rounding" in solution.reason


def test_the_width_bound_is_counted_on_a_grid_of_tolerances_from_one_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(rows - rows.mean(0)).Q
    values = torch.tensor([1.0, 0.5, 0.2, 0.05, 0.02, 0.005], dtype=torch.float64)
    other = torch.linalg.qr(torch.randn(40, 6, generator=generator, dtype=torch.float64)).Q
    features = rotation @ torch.diag(values) @ other.T
    moments = Moments.of(features, features[:, :5])
    found = {bound.tolerance: bound.rank_features for bound in width_bound(moments).grid()}
    assert found == {1e-3: 6, 1e-2: 5, 3e-2: 4, 0.1: 3, 0.3: 2}
    assert width_bound(moments).at(0.1).bound == width_bound(moments, tolerance=0.1).bound
    with pytest.raises(ValueError, match="tolerance"):
        width_bound(moments).at(1e-4)


def test_the_rank_is_of_the_features_not_of_the_gram():
    singular = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    moments = Moments.of(torch.diag(singular), torch.eye(3, dtype=torch.float64))
    assert [width_bound(moments, tolerance=each).rank_features for each in (1e-3, 1e-5)] == [2, 3]
    with pytest.raises(ValueError, match="tolerance"):
        width_bound(moments, tolerance=1e-12)


def test_misuse_of_the_forms_is_a_value_error():
    features, targets = relu_problem(0, 30, 10, 2, 8)
    moments = Moments.of(features, targets)
    with pytest.raises(ValueError, match="units"):
        solve_unit_count(moments, 3.5)
    with pytest.raises(ValueError, match="max_rounds"):
        solve_exact(moments, max_rounds=0)
    with pytest.raises(ValueError, match="time_limit"):
        solve_tolerance(moments, 0.1, time_limit=math.nan)
