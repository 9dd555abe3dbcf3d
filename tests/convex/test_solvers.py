"""Every solver on every kind of problem ends certified, and they agree in objective."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso

from compress.convex import (
    SOLVERS,
    Conic,
    Moments,
    MultitaskLasso,
    Newton,
    Proximal,
    reduce_problem,
    solve,
    solve_batch,
)
from compress.convex.solvers.scaled import ScaledProblem
from compress.convex.solvers.small import is_small, minimise_small
from tests.convex.problems import KINDS, independent_certificate, normal, problem_of_kind

EVERY = SOLVERS | {"newton in torch alone": Newton(small=0)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", EVERY.values(), ids=EVERY.keys())
def test_every_solver_is_certified_by_an_independent_computation(solver, kind):
    problem = problem_of_kind(kind)
    solution = solve(problem, solver, tolerance=1e-6)
    primal, dual = independent_certificate(problem, solution.coefficients)
    assert solution.certified, solution.message
    assert solution.objective == pytest.approx(primal, rel=1e-9)
    assert primal - dual <= 1.01e-6 * primal + 1e-13 * problem.moments.energy


@pytest.mark.parametrize("kind", KINDS)
def test_the_solvers_agree_in_objective(kind):
    problem = problem_of_kind(kind, seed=5)
    objectives = [solve(problem, solver).objective for solver in EVERY.values()]
    assert max(objectives) - min(objectives) <= 2e-6 * min(objectives)


@pytest.mark.parametrize(("units", "size", "outputs"), [(60, 1, 10), (12, 3, 5), (10, 2, 60), (30, 1, 1)])
def test_nearly_all_small_problems_are_solved_in_numpy_alone(units, size, outputs):
    reasons = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        features = (normal(generator, 200, 8) @ normal(generator, 8, units * size)).relu()
        moments = Moments.of(features, features @ normal(generator, units * size, outputs), group_size=size)
        moments = moments.centred() if seed % 2 else moments
        for fraction in (0.7, 0.3, 0.1, 0.01):
            problem = MultitaskLasso(moments, fraction * MultitaskLasso(moments, 0.0).lambda_max)
            scaled = ScaledProblem.of(problem)
            assert is_small(scaled.cross, Newton().small)
            outcome = minimise_small(scaled, 1e-6, None, 1000, math.inf)
            reasons.append(outcome.reason)
            primal, dual = independent_certificate(problem, scaled.from_scaled(outcome.coefficients))
            assert outcome.reason or primal - dual <= 1.01e-6 * primal + 1e-13 * moments.energy
            assert outcome.reason or primal == pytest.approx(solve(problem, Newton(small=0)).objective, rel=2e-6)
    assert sum(map(bool, reasons)) <= 1, reasons


def test_a_small_problem_that_runs_out_says_so():
    problem = problem_of_kind("rank-deficient")
    problem = MultitaskLasso(problem.moments, 1e-6 * problem.lambda_max, problem.unit_costs)
    short = solve(problem, max_iterations=1, tolerance=1e-9)
    assert "1 iterations were not enough" in short.message
    assert "time limit" in solve(problem, time_limit=0.0).message


def test_large_problems_are_not_small():
    assert not is_small(torch.zeros(300, 10), Newton().small)
    assert not is_small(torch.zeros(4, 4000), Newton().small)
    assert not is_small(torch.zeros(0, 3), Newton().small)
    assert not is_small(torch.zeros(20, 10), 0)


def test_one_output_is_the_lasso_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    features = normal(generator, 60, 15)
    outputs = features @ normal(generator, 15, 1) + normal(generator, 60, 1)
    problem = MultitaskLasso(Moments.of(features, outputs), 0.2)
    peer = Lasso(alpha=0.2, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(
        features.numpy(), outputs[:, 0].numpy()
    )
    ours = solve(problem, tolerance=1e-12).coefficients[:, 0]
    torch.testing.assert_close(ours, torch.as_tensor(peer.coef_), rtol=1e-6, atol=1e-7)


def test_centring_is_an_unpenalised_intercept():
    generator = torch.Generator().manual_seed(0)
    features = normal(generator, 60, 15) + 3
    outputs = features @ normal(generator, 15, 1) + normal(generator, 60, 1) + 7
    problem = MultitaskLasso(Moments.of(features, outputs).centred(), 0.2)
    peer = Lasso(alpha=0.2, tol=1e-12, max_iter=100_000).fit(features.numpy(), outputs[:, 0].numpy())
    ours = solve(problem, tolerance=1e-12).coefficients[:, 0]
    torch.testing.assert_close(ours, torch.as_tensor(peer.coef_), rtol=1e-6, atol=1e-7)


def test_one_unit_has_a_closed_form():
    problem = problem_of_kind("one unit")
    moments = problem.moments
    norm = float(moments.cross.norm())
    shrunk = max(0.0, 1 - problem.penalty * float(problem.costs[0]) / norm)
    expected = moments.cross / moments.gram * shrunk
    torch.testing.assert_close(solve(problem, tolerance=1e-12).coefficients, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("solver", EVERY.values(), ids=EVERY.keys())
def test_a_penalty_above_the_silencing_one_keeps_no_unit(solver):
    problem = problem_of_kind("well-posed")
    above = MultitaskLasso(problem.moments, 1.001 * problem.lambda_max, problem.unit_costs)
    assert solve(above, solver).active.numel() == 0
    below = MultitaskLasso(problem.moments, 0.99 * problem.lambda_max, problem.unit_costs)
    assert solve(below, "newton").active.numel() >= 1


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_the_gap_bounds_the_suboptimality_of_any_point(seed):
    generator = torch.Generator().manual_seed(seed)
    problem = problem_of_kind(KINDS[seed % len(KINDS)], seed)
    best = solve(problem, tolerance=1e-9).objective
    point = normal(generator, *problem.moments.cross.shape) * 10 ** float(torch.rand(1, generator=generator) * 4 - 3)
    objective = problem.objective(point)
    assert objective - best <= problem.duality_gap(point) * objective * (1 + 1e-9) + 1e-12 * objective


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 100_000),
    units=st.integers(1, 14),
    outputs=st.sampled_from([1, 2, 5, 40]),
    size=st.sampled_from([1, 1, 2, 4]),
    rows=st.sampled_from([3, 10, 60]),
    feature_scale=st.sampled_from([1e-8, 1.0, 1e8]),
    output_scale=st.sampled_from([1e-8, 1.0, 1e8]),
    fraction=st.sampled_from([1.0, 0.3, 1e-2, 1e-4, 1e-6]),
    fault=st.sampled_from(["none", "duplicate", "zero column", "zero outputs", "rank one", "unlike scales"]),
)
def test_no_generated_problem_gets_a_wrong_certificate(
    seed, units, outputs, size, rows, feature_scale, output_scale, fraction, fault
):
    generator = torch.Generator().manual_seed(seed)
    features = normal(generator, rows, units * size)
    if fault == "duplicate":
        features[:, -size:] = features[:, :size]
    if fault == "zero column":
        features[:, 0] = 0
    if fault == "rank one":
        features = normal(generator, rows, 1) @ normal(generator, 1, units * size)
    if fault == "unlike scales":
        features = features * torch.logspace(-6, 6, units * size, dtype=torch.float64)
    targets = features @ normal(generator, units * size, outputs) + normal(generator, rows, outputs)
    targets = targets * (fault != "zero outputs")
    moments = Moments.of(features * feature_scale, targets * output_scale, group_size=size)
    top = MultitaskLasso(moments, 0.0).lambda_max
    problem = MultitaskLasso(moments, fraction * top)
    solution = solve(problem, max_iterations=3000)
    primal, dual = independent_certificate(problem, solution.coefficients)
    assert primal - dual <= solution.gap * primal + 1e-12 * moments.energy
    assert solution.certified == (solution.gap <= 1e-6)
    assert solution.certified or "stopped" in solution.message
    if fraction >= 1e-2:
        assert solution.certified, solution.message


@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("kind", ["well-posed", "conv groups", "rank-deficient"])
def test_rescaling_one_unit_and_its_cost_changes_no_output(kind, factor):
    problem = problem_of_kind(kind)
    moments, s = problem.moments, problem.moments.group_size
    scale = torch.ones(moments.gram.shape[0], dtype=torch.float64)
    scale[s : 2 * s] = factor
    rescaled = Moments(
        covariance=moments.covariance * scale[:, None] * scale,
        cross_covariance=moments.cross_covariance * scale[:, None],
        centred_energy=moments.centred_energy,
        feature_mean=moments.feature_mean * scale,
        output_mean=moments.output_mean,
        count=moments.count,
        group_size=s,
    )
    costs = problem.costs.clone()
    costs[1] *= factor
    a = solve(problem, tolerance=1e-10)
    b = solve(MultitaskLasso(rescaled, problem.penalty, costs), tolerance=1e-10)
    torch.testing.assert_close(moments.gram @ a.coefficients, moments.gram @ (b.coefficients * scale[:, None]))


@pytest.mark.parametrize("seed", range(4))
def test_a_nearly_exact_problem_with_a_tiny_penalty_is_certified(seed):
    generator = torch.Generator().manual_seed(seed)
    features = normal(generator, 30, 60).relu()
    moments = Moments.of(features, normal(generator, 30, 3))
    problem = MultitaskLasso(moments, 1e-6 * MultitaskLasso(moments, 0.0).lambda_max)
    solution = solve(problem)
    assert solution.certified, solution.message
    primal, dual = independent_certificate(problem, solution.coefficients)
    assert primal - dual <= 1.01e-6 * primal + 1e-13 * moments.energy


def test_a_solver_that_runs_out_says_so_and_gives_its_true_gap():
    problem = problem_of_kind("tiny penalty")
    solution = solve(problem, "proximal", tolerance=1e-12, max_iterations=10)
    assert not solution.certified
    assert "iterations were not enough" in solution.message
    primal, dual = independent_certificate(problem, solution.coefficients)
    assert solution.gap == pytest.approx((primal - dual) / primal, rel=1e-6)


def test_a_non_finite_point_is_never_certified():
    problem = problem_of_kind("well-posed")
    point = torch.full_like(problem.moments.cross, math.nan)
    assert problem.duality_gap(point) == math.inf


@pytest.mark.parametrize(("kind", "dead", "merged"), [("dead unit", 1, 0), ("twin units", 0, 2), ("well-posed", 0, 0)])
def test_dead_units_and_multiples_are_dropped_without_changing_the_minimum(kind, dead, merged):
    problem = problem_of_kind(kind)
    reduction = reduce_problem(problem)
    assert (reduction.dead, reduction.merged) == (dead, merged)
    inner = solve(reduction.problem, "conic", tolerance=1e-7)
    whole = reduction.restore(inner.coefficients, problem)
    assert problem.objective(whole) == pytest.approx(inner.objective, rel=1e-9)
    assert problem.duality_gap(whole) <= 1e-5


def test_outputs_are_rotated_to_their_rank_without_changing_the_minimum():
    generator = torch.Generator().manual_seed(0)
    features = normal(generator, 100, 60)
    outputs = features @ normal(generator, 60, 4) @ normal(generator, 4, 48)
    problem = MultitaskLasso(Moments.of(features, outputs), 2.0)
    reduction = reduce_problem(problem)
    assert reduction.rotation is not None
    assert reduction.rotation.shape == (48, 4)
    solution = solve(problem)
    assert solution.certified
    inner = solve(reduction.problem)
    assert inner.objective == pytest.approx(solution.objective, rel=1e-6)


@pytest.mark.parametrize("algorithm", ["admm", "accelerated"])
def test_a_batch_of_unlike_layers_and_penalties_equals_one_by_one(algorithm):
    bases = [problem_of_kind(kind) for kind in ("well-posed", "conv groups", "dead unit")]
    problems = [
        MultitaskLasso(base.moments, fraction * base.lambda_max, base.unit_costs)
        for base in bases
        for fraction in (0.7, 0.2, 0.05)
    ]
    for problem, solution in zip(problems, solve_batch(problems, Proximal(batch=5, algorithm=algorithm)), strict=True):
        assert solution.certified, solution.message
        assert solution.objective == pytest.approx(solve(problem).objective, rel=3e-6)


@pytest.mark.parametrize("algorithm", ["admm", "accelerated"])
def test_layers_of_like_size_share_a_batch(algorithm):
    generator = torch.Generator().manual_seed(3)
    layers = []
    for units, outputs in ((20, 5), (23, 4), (24, 5)):
        features = normal(generator, 60, units)
        layers.append(Moments.of(features, features @ normal(generator, units, outputs)))
    problems = [
        MultitaskLasso(moments, fraction * MultitaskLasso(moments, 0.0).lambda_max)
        for fraction in (0.5, 0.1, 0.02)
        for moments in layers
    ]
    for problem, solution in zip(problems, solve_batch(problems, Proximal(algorithm=algorithm)), strict=True):
        primal, dual = independent_certificate(problem, solution.coefficients)
        assert solution.certified, solution.message
        assert primal - dual <= 1.01e-6 * primal


def test_a_batch_past_its_time_limit_returns_points_with_their_gaps():
    problem = problem_of_kind("well-posed")
    problems = [MultitaskLasso(problem.moments, f * problem.lambda_max, problem.unit_costs) for f in (0.5, 0.1)]
    for solution in solve_batch(problems, Proximal(batch=1), tolerance=1e-13, time_limit=0.0):
        assert not solution.certified
        assert "time limit" in solution.message
        assert solution.gap > 1e-13


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_single_precision_iterations_are_certified_in_double(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    problem = problem_of_kind("well-posed")
    (solution,) = solve_batch([problem], Proximal(device=device, dtype=torch.float32), tolerance=1e-4)
    primal, dual = independent_certificate(problem, solution.coefficients)
    assert solution.certified
    assert solution.coefficients.dtype == torch.float64
    assert solution.gap == pytest.approx((primal - dual) / primal, rel=1e-6)


@pytest.mark.parametrize("backend", ["clarabel", "scs"])
def test_both_cone_solvers_referee(backend):
    problem = problem_of_kind("conv groups")
    assert solve(problem, Conic(backend)).objective == pytest.approx(solve(problem).objective, rel=1e-5)


def test_equal_input_gives_equal_bytes():
    first, second = (solve(problem_of_kind("rank-deficient")).coefficients for _ in range(2))
    assert first.numpy().tobytes() == second.numpy().tobytes()


def test_misuse_is_a_value_error():
    problem = problem_of_kind("well-posed")
    with pytest.raises(ValueError, match="solver"):
        solve(problem, "simplex")
    with pytest.raises(ValueError, match="penalty"):
        MultitaskLasso(problem.moments, -1.0)
    with pytest.raises(ValueError, match="unit_costs"):
        MultitaskLasso(problem.moments, 1.0, torch.zeros(12))
    with pytest.raises(ValueError, match="start"):
        solve(problem, start=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="penalty"):
        MultitaskLasso(problem.moments, "small")
    with pytest.raises(ValueError, match="time_limit"):
        solve(problem, time_limit=math.nan)


def test_arrays_and_numbers_of_any_kind_are_taken():
    problem = problem_of_kind("well-posed")
    plain = solve(problem, tolerance=1e-9)
    for penalty in (torch.tensor(problem.penalty, dtype=torch.float64), numpy.float64(problem.penalty)):
        other = MultitaskLasso(problem.moments, penalty, problem.unit_costs.numpy())
        again = solve(other, tolerance=1e-9, start=plain.coefficients.numpy())
        assert again.objective == pytest.approx(plain.objective, rel=1e-8)
    switches = normal(torch.Generator().manual_seed(0), 30, 4) > 0
    assert torch.equal(Moments.of(switches, switches).gram, Moments.of(switches.double(), switches.double()).gram)


@pytest.mark.parametrize("solver", EVERY.values(), ids=EVERY.keys())
def test_no_solver_starts_past_its_time_limit(solver):
    problem = problem_of_kind("well-posed")
    assert "time limit" in solve(problem, solver, time_limit=-1.0).message


@pytest.mark.parametrize("seed", range(4))
def test_a_tolerance_just_above_rounding_is_met(seed):
    generator = torch.Generator().manual_seed(seed)
    features = normal(generator, 60, 20) + 1e5
    moments = Moments.of(features, features @ normal(generator, 20, 3)).centred()
    problem = MultitaskLasso(moments, 0.05 * MultitaskLasso(moments, 0.0).lambda_max)
    rounding = solve(problem).rounding
    solution = solve(problem, tolerance=1.5 * rounding)
    assert solution.certified, solution.message


@pytest.mark.parametrize("fraction", [1e-10, 1e-12, 1e-13, 1e-100, 1e-300])
@pytest.mark.parametrize("inputs", [8, 40])
def test_a_penalty_that_rounding_hides_ends_near_least_squares_at_once(fraction, inputs):
    generator = torch.Generator().manual_seed(inputs)
    features = (normal(generator, 400, inputs) @ normal(generator, inputs, 48)).relu()
    moments = Moments.of(features, features @ normal(generator, 48, 5))
    problem = MultitaskLasso(moments, fraction * MultitaskLasso(moments, 0.0).lambda_max)
    solution = solve(problem)
    assert not solution.certified
    assert "rounding" in solution.message
    assert solution.gap <= 3 * max(solution.rounding, 0.5 if fraction < 1e-13 else 0.0)
    assert solution.iterations < 200
    assert solution.error < 1e-6
    assert independent_certificate(problem, solution.coefficients)[0] == pytest.approx(solution.objective, rel=0.1)
