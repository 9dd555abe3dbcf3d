"""PathProx: its couplings, its proximal operator, and that projection and balancing never change the network."""

import copy

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from compress.models import digits_net, mlp, mlp_factorized, mnist_cnn
from compress.training import PathProx, ProximalL1, find_couplings, group_lasso_term, weight_decay_objective
from compress.training.proximal.pathprox import shrink_factors, shrink_norms
from compress.training.proximal.penalties import soft_threshold


def chain(inputs=6, width=8, outputs=3):
    """Two single-hidden-layer networks in a row, as the factorized MLPs of the paper."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, outputs),
    )  # fmt: skip


def problem(seed=0, count=40):
    torch.manual_seed(seed)
    return chain(), torch.randn(count, 6), torch.randint(0, 3, (count,))


def train(module, optimizer, inputs, labels, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(module(inputs), labels).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("build", "shape", "expected"),
    [
        (lambda: mlp((6, 5, 4, 7, 3)), (2, 6), [("layers.0", "layers.2"), ("layers.4", "layers.6")]),
        (
            lambda: mlp_factorized((6, 5, 4, 3), hidden=7),
            (2, 6),
            [("layers.0.1", "layers.2.0"), ("layers.2.1", "layers.4.0")],
        ),
        (lambda: mnist_cnn(widths=(4, 5, 6), hidden=7), (2, 1, 28, 28),
         [("features.0", "features.3"), ("features.6", "classifier.0")]),
        (digits_net, (2, 1, 8, 8),
         [("features.1", "features.3"), ("features.4", "classifier.0"), ("classifier.2", "classifier.4")]),
    ],
)  # fmt: skip
def test_layers_are_coupled_in_disjoint_pairs(build, shape, expected):
    couplings = find_couplings(build(), torch.randn(shape))
    pairs = [(pair.inputs[0].part.name, pair.outputs[0].part.name) for pair in couplings.pairs]
    assert pairs == [(f"{one}.weight", f"{other}.weight") for one, other in expected]


def test_the_group_threshold_is_the_proximal_operator():
    """Against cvxpy's minimiser of ½‖x − v‖² + a Σ‖x_k‖."""
    v = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    amount = 1.5
    x = cp.Variable((5, 4))
    cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - v.numpy()) + amount * cp.sum(cp.norm(x, 2, axis=1)))).solve(
        solver="CLARABEL"
    )
    ours = v * shrink_factors(v.norm(dim=1), amount)[:, None]
    assert np.abs(ours.numpy() - x.value).max() < 1e-5
    assert bool((ours.norm(dim=1) == 0).any())


@pytest.mark.parametrize("amount", [0.05, 0.4, 0.9])
def test_the_shrunk_norms_minimise_the_proximal_problem_of_the_product(amount):
    """Against a grid over (a, b) of ½(a − a₀)² + ½(b − b₀)² + amount·a·b; a zero product may keep the larger norm."""
    grid = torch.linspace(0, 2, 401, dtype=torch.float64)
    inputs = torch.tensor([1.0, 1.0, 1.0, 0.3], dtype=torch.float64)
    outputs = torch.tensor([1.5, 0.5, 0.01, 1.2], dtype=torch.float64)
    first, second = shrink_norms(inputs, outputs, amount)
    for one, other, a, b in zip(inputs, outputs, first, second, strict=True):
        values = 0.5 * (grid[:, None] - one) ** 2 + 0.5 * (grid - other) ** 2 + amount * grid[:, None] * grid
        row, column = divmod(int(values.argmin()), len(grid))
        assert float(a * b) == pytest.approx(float(grid[row] * grid[column]), abs=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_stationary_point_is_one_of_the_path_norm_objective(momentum):
    """The derivative of the loss along an active unit's magnitude is −λ, whatever the momentum."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double()  # smooth: no minimiser at a kink
    inputs = torch.randn(40, 6, dtype=torch.float64)
    labels = inputs[:, :3].argmax(1)
    couplings = find_couplings(module, inputs[:2])
    (pair,) = couplings.pairs
    rate = 0.4 * (1 - momentum)
    optimizer = PathProx(module.parameters(), couplings, lr=rate, penalty=0.005, momentum=momentum)
    train(module, optimizer, inputs, labels, 1200)
    for parameter in module.parameters():
        parameter.grad = None
    cross_entropy(module(inputs), labels).backward()
    products = pair.input_norms() * pair.output_norms()
    active = products > 1e-3
    slope = (module[1].weight.grad * module[1].weight).detach().sum(0)[active] / products[active]
    assert bool(active.any())
    assert float((slope + 0.005).abs().max()) < 2e-4


def test_momentum_does_not_grow_when_weights_outgrow_the_sphere():
    """What is moved from ‖w_k‖ into v_k leaves d(v_k w_kᵀ), the running direction of the network, as it was.

    Scaled inversely, as gradients are, the direction would grow by the square of what w_k outgrew the sphere by."""
    module, inputs, labels = problem()
    module, inputs = module.double(), inputs.double()
    couplings = find_couplings(module, inputs[:2])
    optimizer = PathProx(module.parameters(), couplings, lr=0.1, penalty=1e-3, momentum=0.9, layer_balance=False)
    train(module, optimizer, inputs, labels, 5)
    pairs = [(module[0], module[2]), (module[3], module[5])]
    growth = torch.linspace(1, 7, 8, dtype=torch.float64)  # (K,): how far each w_k has outgrown the sphere
    for first, _ in pairs:
        first.weight.data.mul_(growth[:, None])

    def directions():
        """Per pair: the momentum of w (K, inputs), and d(v_k w_kᵀ) (outputs, K, inputs) along the momentum of both."""
        found = []
        for first, second in pairs:
            w, v = first.weight.detach(), second.weight.detach()
            dw, dv = (optimizer.state[layer.weight]["momentum_buffer"].clone() for layer in (first, second))
            path = torch.einsum("ok,ki->oki", dv, w) + torch.einsum("ok,ki->oki", v, dw)
            found.append((dw, path))
        return found

    before = directions()
    optimizer.project()
    for (old, old_path), (new, new_path) in zip(before, directions(), strict=True):
        assert float(old_path.abs().max()) > 1e-3
        torch.testing.assert_close(new_path, old_path)
        assert bool((new.norm(dim=1) <= old.norm(dim=1) * (1 + 1e-9)).all())


def test_the_soft_threshold_is_the_proximal_operator():
    values = torch.linspace(-3, 3, 13, dtype=torch.float64)
    grid = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    best = torch.stack([grid[(0.5 * (grid - value) ** 2 + 0.7 * grid.abs()).argmin()] for value in values])
    assert float((soft_threshold(values, 0.7) - best).abs().max()) < 2e-4


@pytest.mark.parametrize("radius", [1.0, None])
@pytest.mark.parametrize("build", [chain, lambda: mlp((6, 5, 4, 7, 3))])
def test_projection_and_layer_balance_do_not_change_the_network(build, radius):
    torch.manual_seed(0)
    module = build().double()
    inputs = torch.randn(9, 6, dtype=torch.float64)
    before = module(inputs).detach()
    couplings = find_couplings(module, inputs[:2])
    optimizer = PathProx(module.parameters(), couplings, lr=0.0, penalty=0.1, radius=radius)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(60):
        optimizer.step()
    assert float((module(inputs).detach() - before).abs().max()) < 1e-12
    norms = [pair.input_norms() for pair in couplings.pairs]
    assert all(float((norm / norm[0] - 1).abs().max()) < 1e-12 for norm in norms)
    for norm, pair in zip(norms, couplings.pairs, strict=True):
        expected = 1.0 if radius else pair.output_norms().square().mean().sqrt().item()
        assert norm[0].item() == pytest.approx(expected, rel=1e-6)
    paths = [pair.path_norm().item() for pair in couplings.pairs]
    assert paths == pytest.approx([paths[0]] * len(paths), rel=1e-6)


def test_the_published_variant_projects_without_moving_the_magnitude():
    module, inputs, _ = problem()
    before, outgoing = module(inputs).detach(), module[2].weight.detach().clone()
    optimizer = PathProx(module.parameters(), find_couplings(module, inputs[:2]), published=True)
    optimizer.project()
    assert torch.equal(module[2].weight, outgoing)
    assert float((module(inputs).detach() - before).abs().max()) > 1e-3


def test_pathprox_reaches_a_lower_objective_than_it_started_with_and_silences_units():
    module, inputs, labels = problem()
    couplings = find_couplings(module, inputs[:2])
    start = weight_decay_objective(module, cross_entropy(module(inputs), labels).item(), 0.02)
    train(module, PathProx(module.parameters(), couplings, lr=0.1, penalty=0.02), inputs, labels, 400)
    end = weight_decay_objective(module, cross_entropy(module(inputs), labels).item(), 0.02)
    assert end < start
    assert couplings.fraction_active() < 1


def test_a_large_penalty_silences_every_unit():
    module, inputs, labels = problem()
    couplings = find_couplings(module, inputs[:2])
    train(module, PathProx(module.parameters(), couplings, lr=0.1, penalty=3.0), inputs, labels, 60)
    assert all(pair.active_units() == 0 for pair in couplings.pairs)
    assert bool(torch.isfinite(module(inputs)).all())


def test_state_dict_resumes_the_same_run_and_schedulers_move_the_rate():
    runs = []
    for interrupted in (False, True):
        module, inputs, labels = problem()
        optimizer = PathProx(module.parameters(), find_couplings(module, inputs[:2]), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        for step in range(12):
            if interrupted and step == 6:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = PathProx(module.parameters(), find_couplings(module, inputs[:2]), lr=1.0, momentum=0.9)
                optimizer.load_state_dict(saved)
                schedule.optimizer = optimizer
            train(module, optimizer, inputs, labels, 1)
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)
        runs.append(module[0].weight.detach().clone())
    assert torch.equal(*runs)


def test_parameter_groups_have_penalties_of_their_own_and_frozen_layers_stay():
    module, inputs, labels = problem()
    frozen = module[5].weight.detach().clone()
    couplings = find_couplings(module, inputs[:2])
    groups = [{"params": module[:3].parameters(), "penalty": 3.0}, {"params": module[3].parameters()}]
    optimizer = PathProx(groups, couplings, lr=0.1, penalty=0.0)
    assert [pair.name for pair in optimizer.couplings] == ["0"]
    train(module, optimizer, inputs, labels, 60)
    assert couplings.pairs[0].active_units() == 0
    assert torch.equal(module[5].weight, frozen)


def test_gradient_scaling_leaves_the_step_as_it_is():
    steps = []
    for scaled in (False, True):
        module, inputs, labels = problem()
        optimizer = PathProx(module.parameters(), find_couplings(module, inputs[:2]), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(module(inputs), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(module[0].weight.detach().clone())
    assert float((steps[0] - steps[1]).abs().max()) < 1e-3


def test_momentum_commutes_with_rescaling():
    """Where the magnitude sits between w and v when a step starts makes no difference after projection."""
    results = []
    for factor in (1.0, 3.0):
        module, inputs, labels = problem()
        module.double()
        couplings = find_couplings(module, inputs[:2].double())
        optimizer = PathProx(module.parameters(), couplings, lr=0.05, momentum=0.9)
        train(module, optimizer, inputs.double(), labels, 3)
        pair = couplings.pairs[0]
        scale = torch.full((pair.units,), factor, dtype=torch.float64)
        for bound in (*pair.inputs, *pair.shifts):
            optimizer._rescale(bound, scale)
        for bound in pair.outputs:
            optimizer._rescale(bound, scale.reciprocal())
        optimizer.project()
        train(module, optimizer, inputs.double(), labels, 3)
        results.append(module(inputs.double()).detach())
    assert float((results[0] - results[1]).abs().max()) < 1e-10


def test_the_l1_step_thresholds_weights_and_not_biases():
    module, _, _ = problem()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    bias = module[0].bias.detach().clone()
    weight = module[0].weight.detach().clone()
    ProximalL1(module.parameters(), lr=0.5, penalty=0.2).step()
    assert torch.equal(module[0].bias, bias)
    assert torch.allclose(module[0].weight, weight.sign() * (weight.abs() - 0.1).clamp_min(0))


def test_the_group_lasso_term_is_the_sum_of_column_norms():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    direct = sum(float(layer.weight.detach()[:, k].norm()) for layer in (module[0], module[2])
                 for k in range(layer.in_features))  # fmt: skip
    assert group_lasso_term(module).item() == pytest.approx(direct, rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"penalty": float("nan")},
        {"nesterov": True},
        {"weight_decay": -1.0},
        {"radius": 0.0},
        {"momentum": 1.0},
    ],
)
def test_wrong_settings_are_refused(wrong):
    module, inputs, _ = problem()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PathProx(module.parameters(), find_couplings(module, inputs[:2]), **wrong)
