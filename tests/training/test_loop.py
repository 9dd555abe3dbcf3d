"""The training loop: it learns, stops early, keeps the best weights, and resumes to the same bytes."""

import numpy as np
import pytest
import torch
from torch import nn

from compress.data import open_data
from compress.errors import NonFiniteError, OutputError, RecipeError
from compress.training.loop import Length, Lesson, Stepping, batch_count, fit, in_batches, score
from compress.training.losses import LOSSES, poisson_loss, squared_loss
from compress.training.plateau import measure_plateau

LOSS = LOSSES["cross_entropy"]


@pytest.fixture
def source(tmp_path):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 120)
    images = np.zeros((120, 4, 4, 1), np.uint8)
    for number, label in enumerate(labels):
        images[number, label] = 200
    images += generator.integers(0, 50, images.shape).astype(np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return open_data(f"npz:{tmp_path / 'data.npz'}", None)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def run(source, epochs, validation=None, **options):
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    lesson = Lesson(LOSS, source, validation, 16)
    return module, fit(module, lesson, Stepping(optimizer, schedule), Length(epochs), **options)


def test_the_loop_learns_and_keeps_the_best_epoch(source):
    module, found = run(source, 5, validation=source)
    losses = [entry["validation_loss"] for entry in found.curve]
    assert score(module, source, LOSS)[0] == pytest.approx(min(losses))
    assert score(module, source, LOSS)[1] == 1.0
    assert found.best_epoch == losses.index(min(losses)) + 1


def test_an_interrupted_run_ends_with_the_same_weights(source, tmp_path):
    whole, _ = run(source, 4)
    run(source, 2, state_file=tmp_path / "state")
    resumed, found = run(source, 4, state_file=tmp_path / "state")
    assert len(found.curve) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_patience_stops_a_run_that_does_not_improve(source):
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    found = fit(module, Lesson(LOSS, source, source), Stepping(optimizer), Length(9, patience=2))
    assert found.stopped_early
    assert len(found.curve) == 3


def test_a_diverging_run_and_a_foreign_state_are_refused(source, tmp_path):
    module = network()
    with torch.no_grad():
        module[1].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="epoch 1"):
        fit(module, Lesson(LOSS, source), Stepping(torch.optim.SGD(module.parameters(), lr=0.1)), Length(1))
    (tmp_path / "state").write_bytes(b"other")
    with pytest.raises(OutputError, match="does not continue"):
        run(source, 1, state_file=tmp_path / "state")


def test_losses_meet_their_formulas():
    outputs, labels = torch.tensor([[0.5, 1.0], [0.0, -1.0]]), torch.tensor([1, 0])
    assert squared_loss(outputs, labels).item() == pytest.approx((0.25 + 0.0 + 1.0 + 1.0) / 2)
    expected = -torch.distributions.Poisson(outputs.exp()).log_prob(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).sum() / 2
    assert poisson_loss(outputs, labels).item() == pytest.approx(expected.item())


def test_the_plateau_of_separable_classes_starts_early():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    inputs = torch.eye(3)[labels] * 3 + 0.1 * torch.randn(30, 3, generator=generator)
    found = measure_plateau(inputs, labels, [1, 3, 8], penalty=1e-2, steps=300, rate=0.03, seeds=(0, 1))
    assert found.losses[0] > 1.1 * found.losses[-1]
    assert found.start == 3
    assert found.data_bound == 30 * 31


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(17, [17] * 6 + [18]), (119, [120]), (7, [7] * 16 + [8]), (120, [120])]
)
def test_a_sample_that_is_left_over_joins_the_batch_before(source, batch_size, sizes):
    assert [len(piece) for piece in in_batches(torch.arange(120), batch_size)] == sizes
    assert batch_count(120, batch_size) == len(sizes)
    module = normed()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    found = fit(module, Lesson(LOSS, source, None, batch_size), Stepping(optimizer, schedule), Length(1))
    assert found.curve[0]["loss"] > 0


def test_batch_norms_with_batches_of_one_sample_are_refused_in_one_line(source):
    module = normed()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(RecipeError, match="two samples or more"):
        fit(module, Lesson(LOSS, source, None, 1), Stepping(optimizer, schedule), Length(1))
