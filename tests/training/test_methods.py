"""Rates, augmentation, and ℓ1 proximal steps under momentum."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from compress.recipe import TrainingOptions
from compress.training import ProximalL1
from compress.training.methods import make_augmentation, make_method, make_schedule, random_crop
from compress.training.proximal.penalties import soft_threshold


def options(**given):
    return TrainingOptions.model_validate({"epochs": 10, "lr": 1.0, **given})


def rates(**given):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, options(**given), 4)
    found = []
    for _ in range(40):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_warms_up_and_falls_as_a_half_cosine():
    found = rates(warmup=2)
    assert found[:8] == sorted(found[:8])
    assert found[8] == 1.0
    assert found[24] == pytest.approx(0.5)
    assert found[8:] == sorted(found[8:], reverse=True)


def test_the_rate_falls_at_milestones():
    found = rates(schedule="step", milestones=(5, 8), gamma=0.1)
    assert found[19:21] == [1.0, pytest.approx(0.1)]
    assert found[-1] == pytest.approx(0.01)


def test_every_crop_is_a_window_of_the_padded_image():
    images = torch.arange(1.0, 2 * 3 * 5 * 5 + 1).view(2, 3, 5, 5)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    cropped = random_crop(images, 2, torch.Generator().manual_seed(0))
    assert cropped.shape == images.shape
    for one, whole in zip(cropped, padded, strict=True):
        windows = [whole[:, top : top + 5, left : left + 5] for top in range(5) for left in range(5)]
        assert any(torch.equal(one, window) for window in windows)


def test_flips_mirror_about_half_of_the_images():
    images = torch.randn(400, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    augment = make_augmentation(options(flip=True))
    flipped = augment(images, torch.Generator().manual_seed(0))
    same = (flipped == images).all(3).all(2).all(1)
    mirrored = (flipped == images.flip(3)).all(3).all(2).all(1)
    assert bool((same | mirrored).all())
    assert 160 < int(mirrored.sum()) < 240


def prepared(penalty=0.01, **settings):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs, labels = torch.randn(40, 6), torch.randint(0, 3, (40,))
    return module, inputs, labels, ProximalL1(module.parameters(), penalty=penalty, **settings)


def take_steps(module, inputs, labels, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(module(inputs), labels).backward()
        optimizer.step()


def test_the_l1_optimizer_resumes_from_its_state_dict():
    runs = []
    for interrupted in (False, True):
        module, inputs, labels, optimizer = prepared(lr=0.05, momentum=0.9)
        take_steps(module, inputs, labels, optimizer, 5)
        if interrupted:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = ProximalL1(module.parameters(), lr=1.0, penalty=0.5)
            optimizer.load_state_dict(saved)
        take_steps(module, inputs, labels, optimizer, 5)
        runs.append(module[0].weight.detach().clone())
    assert torch.equal(*runs)


def test_a_scheduler_moves_the_rate_and_the_threshold_of_the_l1_optimizer():
    module, _, _, optimizer = prepared(lr=1.0, penalty=0.2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    start = module[0].weight.detach().clone()
    for amount in (0.2, 0.1):
        optimizer.step()
        schedule.step()
        start = soft_threshold(start, amount)
        assert torch.allclose(module[0].weight, start)


def test_gradient_scaling_leaves_the_l1_step_as_it_is():
    steps = []
    for scaled in (False, True):
        module, inputs, labels, optimizer = prepared(lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(module(inputs), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(module[0].weight.detach().clone())
    assert float((steps[0] - steps[1]).abs().max()) < 1e-3


def test_without_a_penalty_the_l1_optimizer_is_sgd():
    for settings in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}):
        module, inputs, labels, optimizer = prepared(penalty=0.0, lr=0.1, **settings)
        other = copy.deepcopy(module)
        take_steps(module, inputs, labels, optimizer, 6)
        take_steps(other, inputs, labels, torch.optim.SGD(other.parameters(), lr=0.1, **settings), 6)
        assert torch.allclose(module[2].weight, other[2].weight, atol=1e-6)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    module, inputs, labels, optimizer = prepared(lr=0.1)
    before = module[0].weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(module(inputs), labels)
        loss.backward()
        return loss

    wanted = cross_entropy(module(inputs), labels).item()
    assert optimizer.step(closure).item() == pytest.approx(wanted)
    assert not torch.equal(module[0].weight, before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_force_on_nonzeros_is_the_penalty_whatever_the_momentum(momentum):
    torch.manual_seed(0)
    module = nn.Linear(8, 3, bias=False).double()
    inputs, outputs = torch.randn(40, 8, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    optimizer = ProximalL1(module.parameters(), lr=0.03, penalty=0.05, momentum=momentum)
    for _ in range(4000):
        optimizer.zero_grad()
        (0.5 * (module(inputs) - outputs).square().sum(1).mean()).backward()
        optimizer.step()
    forces, nonzero = module.weight.grad.abs(), module.weight.detach() != 0
    assert 0 < int(nonzero.sum()) < nonzero.numel()
    assert torch.allclose(forces[nonzero], torch.tensor(0.05, dtype=torch.float64), atol=1e-9)
    assert float(forces[~nonzero].max()) <= 0.05 + 1e-9


@pytest.mark.parametrize("radius", [0.0, 0.5, 1.0])
def test_pathprox_holds_the_radius_of_the_options(radius):
    module, inputs, labels, _ = prepared()
    given = options(method="pathprox", lr=0.05, radius=radius)
    method = make_method(module, inputs[:2], given)
    take_steps(module, inputs, labels, method.optimizer, 3)
    (pair,) = method.couplings.pairs
    norms = pair.input_norms()
    if radius == 0.0:
        assert norms.square().sum().item() == pytest.approx(pair.output_norms().square().sum().item(), rel=1e-3)
    else:
        assert norms.tolist() == pytest.approx([radius] * pair.units, rel=1e-4)


@pytest.mark.parametrize(("method", "name"), [("pathprox", "penalty"), ("l1", "penalty"), ("sgd", "weight_decay")])
def test_the_penalty_rises_over_the_ramp_and_stays(method, name):
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    chosen = options(method=method, penalty=0.1, ramp=2)
    optimizer = make_method(module, torch.zeros(2, 4), chosen).optimizer
    schedule = make_schedule(optimizer, chosen, 4)
    found = []
    for _ in range(12):
        found.append(optimizer.param_groups[0][name])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx([0.1 * min(1, step / 8) for step in range(12)])


def test_the_terms_of_lasso_rise_too():
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    chosen = options(method="lasso", penalty=0.1, ramp=2)
    method = make_method(module, torch.zeros(2, 4), chosen)
    schedule = make_schedule(method.optimizer, chosen, 4)
    assert method.extra(module).item() == 0
    for _ in range(8):
        method.optimizer.step()
        schedule.step()
    assert method.extra(module).item() == pytest.approx(
        0.1 * sum(w.abs().sum().item() for w in module.parameters() if w.ndim > 1)
    )
