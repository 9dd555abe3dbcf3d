"""Label-free recovery after a cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.compression.problem import SampleStream
from compress.errors import NonFiniteError
from compress.graph.program import Program, run
from compress.graph.trace import trace_network
from compress.measures.outputs import Output
from compress.progress import SilentProgress
from compress.training import recovery
from compress.training.descent import MOMENTA, Matrices, blocks_of, rate_share, row_sizes, with_weights
from compress.training.drawing import Moves, Placed, moved, placed, step_batch, takes_images
from compress.training.mimic import Mimic, compare, last_features, mean_square, tensors_of
from compress.training.orthogonal import is_matrix, orthogonal_step, orthogonalised
from compress.training.recovery import AUTO_EPOCHS, Recovery, recover
from tests.compression.test_schedule import Samples


class Net(nn.Module):
    """Convolutions, a pooling, a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.pool, self.head = (
            nn.Conv2d(8, width, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Linear(width, 5),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.first(inputs)))
        return self.head(self.pool(torch.relu(self.second(hidden))).flatten(1))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A network and the same with noise on its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = Net()
        original.norm.momentum = None  # the statistics of one batch
        with torch.no_grad():
            original(Samples(140, 3, 16, 16).inputs[:100])
        original.eval()
        other = copy.deepcopy(original)
        for parameter in other.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return original, other


def streams() -> tuple[SampleStream, SampleStream]:
    samples = Samples(140, 3, 16, 16)
    return (
        SampleStream(samples, torch.arange(100), 20),  # type: ignore[arg-type]
        SampleStream(samples, torch.arange(100, 140), 20),  # type: ignore[arg-type]
    )


PROBE = torch.zeros(2, 3, 16, 16)


def outputs_in(program: Program) -> tuple[Output, ...]:
    """The scores of `Net`."""
    return (Output("output", (5,), "classes", class_dim=1, node=program.outputs[0]),)


def recovered(original: nn.Module, cut: nn.Module, **options: Any) -> tuple[nn.Module, Recovery]:
    """recover() on the streams."""
    program = Program.of(trace_network(original, (PROBE,)))
    return recover(original, program, cut, (PROBE,), *streams(), outputs_in(program), SilentProgress(), **options)


def parts(mimic: Mimic, state: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
    return mimic.parts(mimic.answer(state, inputs), mimic.wanted(inputs), len(inputs[0]))


def compared(original: nn.Module, cut: nn.Module, kept: Sequence[Tensor]) -> Mimic:
    """compare() of two networks."""
    program = Program.of(trace_network(original, (PROBE,)))
    plain = Mimic((program, program), tensors_of(original), outputs_in(program), {"output": 1.0})
    return compare(plain, cut, (PROBE,), kept)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (2, 3)])
@pytest.mark.parametrize("apart", [(True, True), (True, False), (False, False)])
def test_squares_are_the_same_in_every_layout_and_gradients_lie_as_the_values_do(
    shape: tuple[int, ...], apart: tuple[bool, bool]
) -> None:
    layouts = [torch.channels_last if each and len(shape) == 4 else torch.contiguous_format for each in apart]
    now, aim = (torch.randn(shape).contiguous(memory_format=layout) for layout in layouts)
    mean_square(now.requires_grad_(), aim).backward()
    assert now.grad is not None
    torch.testing.assert_close(now.grad, 2 * (now.detach() - aim) / now.numel())
    torch.testing.assert_close(mean_square(now, aim), (now - aim).square().mean())
    assert now.grad.is_contiguous(memory_format=layouts[0]) or apart[0] != apart[1]


def test_held_back_samples_gain_and_the_report_says_how_much(pair: tuple[nn.Module, nn.Module]) -> None:
    module, found = recovered(*pair, steps=24)
    assert found.helped
    assert found.divergences[0] == (0, pytest.approx(3.0))
    assert min(loss for _, loss in found.divergences) < 0.8 * found.divergences[0][1]
    (inputs,) = streams()[1].read(0)
    with torch.inference_mode():
        wanted, cut, after = (network(inputs) for network in (*pair, module))
    assert float((after - wanted).norm()) < float((cut - wanted).norm())


def test_weights_that_held_back_samples_like_less_are_not_kept(pair: tuple[nn.Module, nn.Module]) -> None:
    module, found = recovered(pair[0], pair[0], steps=4, rates=(0.5,))
    assert not found.helped
    assert all(torch.equal(tensor, pair[0].state_dict()[name]) for name, tensor in module.state_dict().items())


def test_a_network_whose_statistics_are_off_gets_them_from_the_samples(pair: tuple[nn.Module, nn.Module]) -> None:
    damaged = copy.deepcopy(pair[0])
    damaged.norm.running_mean += 1.0  # type: ignore[union-attr,operator]
    _, found = recovered(pair[0], damaged, steps=1, rates=(1e-9,))
    assert found.refreshed


def test_the_largest_rate_that_does_no_harm_in_a_trial_is_taken(pair: tuple[nn.Module, nn.Module]) -> None:
    _, found = recovered(*pair, steps=20, rates=(50.0, 3e-3, 1e-7))
    assert [rate for rate, _ in found.rates] == [50.0, 3e-3]
    assert found.rates[1][1] < found.divergences[0][1] < found.rates[0][1]
    assert found.divergences[-1][1] < found.rates[1][1]


def test_where_every_rate_does_harm_the_smallest_is_taken(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "HARM", 0.0)
    _, found = recovered(*pair, steps=20, rates=(50.0, 3e-3))
    assert [rate for rate, _ in found.rates] == [50.0, 3e-3]
    assert found.kept_step


def test_a_rate_that_gains_nothing_by_half_gives_way_to_the_next_smaller_one(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "HARM", math.inf)  # the trial sees nothing
    _, found = recovered(*pair, steps=24, rates=(50.0, 3e-3))
    assert [rate for rate, _ in found.rates] == [50.0]
    assert found.helped
    assert [step for step, _ in found.divergences][-6:] == [6, 12, 18, 24, 30, 36]
    assert found.steps == 36
    assert found.kept_step > 12
    assert len(found.divergences) == len(found.checks) <= 8


@pytest.mark.parametrize(("again", "kept"), [((2.8, 2.7, 2.6, 2.5), 36), ((2.95, 2.95), 6)])
def test_a_rate_whose_gain_is_lost_by_half_gives_way_and_what_was_best_is_kept(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch, again: tuple[float, ...], kept: int
) -> None:
    before, first = (3.0, 3.0, 3.0), (2.9, 2.95)  # the network, with statistics, after the trial; a quarter, half
    losses = iter((*before, *first, *again))
    look = recovery.HeldBack.look
    monkeypatch.setattr(recovery.HeldBack, "look", lambda *given: (next(losses), look(*given)[1]))
    _, found = recovered(*pair, steps=24, rates=(1e-6, 1e-7))
    assert [loss for _, loss in found.divergences] == [3.0, *first, *again]
    assert found.kept_step == kept
    assert f"step {kept} of {12 + 6 * len(again)} kept" in found.describe()


def test_it_stops_when_nothing_is_gained(pair: tuple[nn.Module, nn.Module]) -> None:
    _, found = recovered(pair[0], pair[0], steps=64, rates=(0.5,))
    assert found.steps < 64


def test_without_a_number_of_steps_it_goes_through_the_samples_as_often_as_is_said(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    _, found = recovered(*pair)
    assert found.steps == round(AUTO_EPOCHS * len(streams()[0].sizes()))


def test_the_input_stays_and_the_same_seed_gives_the_same_weights(pair: tuple[nn.Module, nn.Module]) -> None:
    before = copy.deepcopy(pair[1].state_dict())
    first, second = (recovered(*pair, steps=5, seed=3)[0].state_dict() for _ in range(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in pair[1].state_dict().items())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_network_that_gives_no_numbers_is_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    pair[1].second.weight.data.fill_(torch.inf)  # type: ignore[union-attr]
    with pytest.raises(NonFiniteError, match="held-back"):
        recovered(*pair, steps=3)


def test_features_in_front_of_the_last_pooling_are_compared_by_the_channels_that_stay(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    whole = compared(*pair, ())
    (last,) = whole.last
    assert whole.programs[0].shape(last.names[0]) == (2, 12, 16, 16)
    assert last_features(whole.programs[0], whole.programs[0].outputs[0]) == last.names[0]
    kept = torch.tensor([0, 3, 4, 7, 11])
    narrower = Net(5).eval()
    for layer in ("first", "norm"):
        getattr(narrower, layer).load_state_dict(getattr(pair[0], layer).state_dict())
    narrower.second.weight.data.copy_(pair[0].second.weight[kept])  # type: ignore[union-attr,index]
    narrower.second.bias.data.copy_(pair[0].second.bias[kept])  # type: ignore[union-attr,index]
    cut = compared(pair[0], narrower, [torch.arange(3), kept])
    state = {name: tensor.detach() for name, tensor in narrower.state_dict().items()}
    assert float(parts(cut, state, streams()[1].read(0))[1]) < 1e-10
    assert not compared(pair[0], narrower, ()).last


class Blocks(nn.Module):
    """Two residual blocks around inner widths that may differ."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, 6, 3, padding=1))
            for _ in range(2)
        )
        self.head = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = torch.relu(self.stem(inputs))
        for block in self.blocks:
            stream = torch.relu_(stream + block(stream))
        return self.head(stream.mean((2, 3)))


def test_what_blocks_hand_on_is_compared_and_what_was_cut_inside_them_is_not() -> None:
    original, cut = Blocks(8).eval(), Blocks(5).eval()
    cut.stem.load_state_dict(original.stem.state_dict())
    found = compared(original, cut, ())
    shapes = [found.programs[1].shape(feature.names[1]) for feature in found.inner]
    assert shapes == [(2, 6, 16, 16)] * 2
    state = tensors_of(cut)
    (inputs,) = streams()[1].read(0)
    first = nn.functional.mse_loss(*(feature_of(network, found, inputs, 0) for network in (original, cut)))
    assert float(first) < 1e-12
    assert float(parts(found, state, [inputs])[2]) > 1e-3
    assert parts(found.balanced(state, streams()[1]), state, [inputs]).isfinite().all()


def feature_of(network: nn.Module, mimic: Mimic, inputs: Tensor, number: int) -> Tensor:
    """The value of an inner feature of the original (`Blocks(8)`) or of the cut network."""
    which = int(network.blocks[0][0].out_channels != 8)  # type: ignore[index,union-attr]
    name = mimic.inner[number].names[which]
    value = run(mimic.programs[which], (tensors_of(network),), [inputs], [name])[name][0]
    assert isinstance(value, Tensor)
    return value


def test_weights_lie_end_to_end_and_are_the_networks_own_before_the_first_step(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    named = dict(pair[1].double().named_parameters())
    blocks = blocks_of(pair[1])
    assert {name for block in blocks for name in block.leaves} == set(named)
    assert [isinstance(block, Matrices) for block in blocks] == [True, False]
    for block in blocks:
        assert all(torch.equal(leaf, named[name]) for name, leaf in block.leaves.items())
        assert all(torch.equal(mean, named[name]) for name, mean in block.averaged().items())
        block.weights.add_(block.scale)
        name, leaf = next(iter(block.leaves.items()))
        torch.testing.assert_close(leaf.detach(), named[name].detach() + row_sizes(named[name].detach()))


def test_steps_are_those_of_adam_on_the_relative_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(5, 3).double()
    (block,) = blocks_of(module)
    named = {name: tensor.detach() for name, tensor in module.named_parameters()}
    offsets = {name: torch.zeros_like(tensor, requires_grad=True) for name, tensor in named.items()}
    adam = torch.optim.Adam(offsets.values(), lr=0.0, betas=MOMENTA)
    for step, rate in enumerate((0.01, 0.03, 0.02), start=1):
        gradients = {name: torch.randn(tensor.shape, generator=generator).double() for name, tensor in named.items()}
        for name, gradient in gradients.items():
            offsets[name].grad = gradient * row_sizes(named[name])
            block.leaves[name].grad.copy_(offsets[name].grad)  # type: ignore[union-attr]
        adam.param_groups[0]["lr"] = rate
        adam.step()
        with torch.no_grad():
            block.move(rate, step)
    for name, tensor in named.items():
        wanted = tensor + row_sizes(tensor) * offsets[name].detach()
        torch.testing.assert_close(block.leaves[name].detach(), wanted)


def test_a_copy_shares_the_weights_it_is_given_and_holds_no_others() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    given = torch.ones(3, 3)
    copied = with_weights(module, {"0.weight": given})
    assert copied[0].weight.data_ptr() == given.data_ptr()
    assert copied[0].bias.data_ptr() == module[0].bias.data_ptr()
    assert copied[1].running_mean.data_ptr() != module[1].running_mean.data_ptr()
    assert not torch.equal(module[0].weight, given)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 8, 3, 3)])
def test_matrices_take_orthogonal_steps(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape, generator=generator))
    (block,) = blocks_of(module)
    block.gradient.copy_(torch.randn(block.gradient.shape, generator=generator))
    with torch.no_grad():
        block.move(0.1, 1)
    weights = module.weight.detach()
    step = ((weights - block.leaves["weight"].detach()) / row_sizes(weights)).flatten(1)
    values = torch.linalg.svdvals(step)
    assert values.max() < 2 * values.min()
    assert float(step.square().mean().sqrt()) == pytest.approx(0.1, rel=0.2)


def test_an_orthogonalised_matrix_keeps_its_directions_and_leaves_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(9, 9, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(20, 9, generator=generator)).Q
    matrix = (left * torch.logspace(0, -1.5, 9)) @ right.T
    turned = left.T @ orthogonalised(matrix) @ right
    assert float((turned - torch.diag(turned.diag())).abs().max()) < 1e-4
    assert 0.6 < float(turned.diag().min()) <= float(turned.diag().max()) < 1.25
    assert not orthogonal_step(torch.zeros(9, 20)).any()


def test_maps_of_one_channel_each_and_small_or_huge_ones_are_no_matrices() -> None:
    shapes = {
        (16, 8, 3, 3): True,
        (10, 64): True,
        (32, 1, 3, 3): False,
        (4, 64): False,
        (1000, 1280): False,
        (9,): False,
    }
    assert {shape: is_matrix(torch.Size(shape)) for shape in shapes} == shapes


def test_one_rate_moves_a_layer_and_its_rescaled_twin_alike() -> None:
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([1e-3, 1.0, 20.0, 0.3])[:, None]
    torch.testing.assert_close(row_sizes(factors * weights)[1:], (factors * row_sizes(weights))[1:])


def test_images_are_moved_by_a_few_pixels_and_other_inputs_are_none() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(64, 1, 32, 32)
    image[:, :, 16, 10] = 1
    draws = [Moves.draw(64, (32, 32), generator) for _ in range(20)]
    places = {tuple(place[2:].tolist()) for moves in draws for place in moved(image, moves).nonzero()}
    assert all(abs(row - 16) <= 4 and min(abs(column - 10), abs(column - 21)) <= 4 for row, column in places)
    assert len(places) > 80
    assert takes_images([image])
    assert not takes_images([image, image])
    assert not any(takes_images([torch.zeros(shape)]) for shape in ((2, 7), (2, 8, 32, 32), (2, 3, 4, 4)))


def test_batches_of_steps_follow_what_a_sample_fills() -> None:
    here, there = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32, device="meta")
    usual = step_batch(here, 10**5, 10**6)
    assert step_batch(here, 10**5, 10**8) < usual
    assert step_batch(there, 10**5, 10**6) > usual
    assert step_batch(here, 1800, 10**6) < usual
    program = Program.of(
        trace_network(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)).eval(), (torch.zeros(2, 4),))
    )
    assert program.computed() == 2 * (9 + 9 + 2)


def test_the_rate_rises_then_falls() -> None:
    shares = [rate_share(step, 50) for step in range(50)]
    assert shares[0] == pytest.approx(0.2)
    assert max(shares) == 1.0
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert 0 < shares[-1] < 0.01


def test_each_sample_comes_once_an_epoch_in_another_order_each_time() -> None:
    samples = Samples(50, 3, 16, 16)
    stream = SampleStream(samples, torch.arange(10, 40), 8)  # type: ignore[arg-type]
    drawn = placed(stream, torch.device("cpu")).drawn(images=False, seed=0)
    epochs = [torch.cat([drawn.next()[0] for _ in range(4)]) for _ in range(2)]
    wanted = samples.inputs[10:40].flatten(1).sum(1).sort().values
    assert all(torch.equal(epoch.flatten(1).sum(1).sort().values, wanted) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_inputs_that_lie_on_a_device_are_drawn_as_those_that_are_read() -> None:
    samples = Samples(50, 3, 16, 16)
    stream = SampleStream(samples, torch.arange(10, 40), 8)  # type: ignore[arg-type]
    read = Placed(stream, torch.device("cpu"))
    held = Placed(stream, torch.device("cpu"), (samples.inputs[10:40],))
    assert torch.equal(read.read(3)[0], held.read(3)[0])
    pair = [each.drawn(images=True, seed=4) for each in (read, held)]
    for _ in range(6):
        first, second = (drawn.next()[0] for drawn in pair)
        assert torch.equal(first, second)
