"""Recording: moments of what the consumers really read, in one network or two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.convex import Moments
from compress.errors import NonFiniteError
from compress.graph.program import Program, run
from compress.graph.trace import trace_network
from compress.recording import pieces
from compress.recording.readings import find_readings, read_rows
from compress.recording.record import (
    GroupRecorder,
    SamplePlan,
    plan_samples,
    record_moments,
    restrict_readings,
)
from compress.recording.store import ActivationStore
from compress.units.find import find_units
from compress.units.groups import UnitGroup

MEMORY = 2**30


class Branches(nn.Module):
    """Convs with stride, padding and dilation, a shortcut inside, a flatten and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.right = nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2)
        self.hidden = nn.Linear(4 * 16, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)))
        x = functional.relu(self.left(x)) + functional.relu(self.right(x))
        return self.head(functional.relu(self.hidden(x.flatten(1))))


@pytest.fixture(scope="module")
def network() -> tuple[Branches, Program, dict[str, Tensor], dict[str, UnitGroup]]:
    torch.manual_seed(0)
    module = Branches().eval()
    graph = trace_network(module, (torch.randn(2, 2, 8, 8),))
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: tensor.detach() for name, tensor in state.items()}
    return module, Program.of(graph), state, {group.name: group for group in find_units(graph, module)}


def batches(count: int = 5, size: int = 4) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 2, 8, 8, generator=generator),) for _ in range(count)]


def recorder(group: UnitGroup, state: dict[str, Tensor], positions: int, targets: bool = False) -> GroupRecorder:
    readings = find_readings(group, state)
    plan = SamplePlan(1000, tuple(positions if reading.kernel else 0 for reading in readings))
    return GroupRecorder(group, readings, plan, seed=0, memory=MEMORY, targets=targets)


def test_conv_rows_are_the_patches_that_the_convolution_multiplies(network: tuple) -> None:  # type: ignore[type-arg]
    module, program, state, groups = network
    found = recorder(groups["first"], state, positions=10**6)
    record_moments(program, [found], lambda number: batches()[number], [4] * 5, state)
    inputs = torch.cat([batch[0] for batch in batches()])
    with torch.no_grad():
        features = functional.relu(module.norm(module.first(inputs)))
        wanted = [
            (functional.unfold(features, 3, padding=1, stride=2), module.left),
            (functional.unfold(features, 3, padding=2, stride=2, dilation=2), module.right),
        ]
    for part, (patches, conv) in zip(found.moments(state), wanted, strict=True):
        rows = patches.transpose(1, 2).reshape(-1, 6 * 9)
        outputs = rows.double() @ conv.weight.detach().double().reshape(4, -1).T
        expected = Moments.of(rows, outputs, group_size=9)
        torch.testing.assert_close(part.gram, expected.gram, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(part.cross, expected.cross, rtol=1e-5, atol=1e-7)
        assert part.energy == pytest.approx(expected.energy, rel=1e-5)


def test_consumers_of_one_window_share_a_reading_and_others_do_not(network: tuple) -> None:  # type: ignore[type-arg]
    _, _, state, groups = network
    assert len(find_readings(groups["first"], state)) == 2


def test_sampled_positions_are_a_subset_and_repeat_with_the_seed(network: tuple) -> None:  # type: ignore[type-arg]
    _, program, state, groups = network
    grams = []
    for _ in range(2):
        found = recorder(groups["first"], state, positions=3)
        record_moments(program, [found], lambda number: batches()[number], [4] * 5, state)
        assert found.rows == 5 * 4 * 3
        grams.append(found.moments(state)[0].gram)
    assert torch.equal(grams[0], grams[1])


def test_units_behind_a_flatten_own_their_positions(network: tuple) -> None:  # type: ignore[type-arg]
    _, _, state, groups = network
    group = next(group for group in groups.values() if any(c.weight == "hidden.weight" for c in group.consumers))
    reading = find_readings(group, state)[0]
    assert reading.group_size == 16
    consumer = reading.consumers[0]
    matrix = reading.matrix(consumer, state["hidden.weight"])
    assert torch.equal(reading.with_matrix(consumer, state["hidden.weight"] * 0, matrix), state["hidden.weight"])


def test_targets_are_the_original_outputs_and_features_those_of_the_changed_network(
    network: tuple,  # type: ignore[type-arg]
) -> None:
    module, program, state, groups = network
    changed = {**state, "first.weight": state["first.weight"] * 0.5}
    found = recorder(groups["hidden"], state, positions=0, targets=True)
    record_moments(program, [found], lambda number: batches()[number], [4] * 5, state, changed)
    inputs = torch.cat([batch[0] for batch in batches()])
    nodes = [groups["hidden"].consumers[0].input]
    values = run(program, (state, changed), (inputs,), nodes)[nodes[0]]
    expected = Moments.of(values[1], values[0].double() @ state["head.weight"].double().T)
    part = found.moments(state)[0]
    torch.testing.assert_close(part.cross, expected.cross, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(part.gram, expected.gram, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(values[0], functional.relu(module.hidden(nodes_input(module, inputs))))


@pytest.mark.parametrize("positions", [0, 3, 999])
def test_a_batch_read_in_pieces_gives_the_same_moments(
    network: tuple,  # type: ignore[type-arg]
    positions: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, program, state, groups = network
    changed = {**state, "first.weight": state["first.weight"] * 0.5}
    moments, kept = [], []
    for numbers in (pieces.PIECE, 200, 1):
        monkeypatch.setattr(pieces, "PIECE", numbers)
        reader = recorder(groups["first"], state, positions=positions or 999, targets=bool(positions))
        record_moments(program, [reader], lambda number: batches()[number], [4] * 5, state, changed)
        moments.append(reader.moments(state))
        values = run(program, (state,), batches()[0], sorted(reader.wanted))
        asked = recorder(groups["first"], state, positions=positions or 999, targets=True)
        kept.append(asked.original_rows({name: pair[0] for name, pair in values.items()}, state))
    for other, rows in zip(moments[1:], kept[1:], strict=True):
        for part, whole in zip(other, moments[0], strict=True):
            torch.testing.assert_close(part.gram, whole.gram, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(part.cross, whole.cross, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(rows, kept[0])


def nodes_input(module: Branches, inputs: Tensor) -> Tensor:
    x = functional.relu(module.norm(module.first(inputs)))
    return (functional.relu(module.left(x)) + functional.relu(module.right(x))).flatten(1)


def test_a_pass_that_starts_from_stored_activations_gives_the_same_moments(network: tuple) -> None:  # type: ignore[type-arg]
    _, program, state, groups = network
    changed = {**state, "left.weight": state["left.weight"] * 0.5}
    frontier = program.frontier(["hidden.weight", "head.weight"], [groups["hidden"].consumers[0].input])
    store = ActivationStore.open(2**26)
    try:
        kept = store.advance(frontier)
        first = recorder(groups["hidden"], state, positions=0, targets=True)
        record_moments(program, [first], lambda number: batches()[number], [4] * 5, state, changed, keep=kept)
        assert len(kept.sizes) == 5

        def unread(number: int) -> tuple[Tensor]:
            raise AssertionError(f"batch {number} was read again")

        third = recorder(groups["hidden"], state, positions=0, targets=True)
        record_moments(program, [third], unread, [4] * 5, state, changed, store=kept, keep=kept)
        assert len(kept.sizes) == 5  # the frontier stayed where it was
        second = recorder(groups["hidden"], state, positions=0, targets=True)
        record_moments(program, [second], unread, [4] * 5, state, changed, store=kept)
        assert not kept.sizes
    finally:
        store.close()
    assert not store.folder.exists()
    for later in (second, third):
        assert torch.equal(first.moments(state)[0].gram, later.moments(state)[0].gram)
        assert torch.equal(first.moments(state)[0].cross, later.moments(state)[0].cross)


def test_what_a_shorter_pass_leaves_out_is_not_run_from_the_inputs_again(network: tuple) -> None:  # type: ignore[type-arg]
    _, program, state, groups = network
    changed = {**state, "left.weight": state["left.weight"] * 0.5}
    frontier = program.frontier(["hidden.weight", "head.weight"], [groups["hidden"].consumers[0].input])
    earlier = program.frontier(["left.weight", "hidden.weight", "head.weight"], [groups["hidden"].consumers[0].input])
    assert earlier != frontier

    def unread(number: int) -> tuple[Tensor]:
        raise AssertionError(f"batch {number} was read again")

    def whole(**stores: ActivationStore) -> GroupRecorder:
        found = recorder(groups["hidden"], state, positions=0, targets=True)
        read = unread if "store" in stores else lambda number: batches()[number]
        record_moments(program, [found], read, [4] * 5, state, changed, **stores)
        return found

    store = ActivationStore.open(2**26)
    try:
        first, second = store.advance(earlier), store.advance(earlier).advance(frontier)
        direct = whole(keep=first)
        short = recorder(groups["hidden"], state, positions=0, targets=True)
        short.plan = SamplePlan(8, short.plan.positions)
        record_moments(program, [short], unread, [4] * 5, state, changed, store=first, keep=second)
        assert [second.reaches(batch) for batch in range(5)] == [True, True, False, False, False]
        third = second.advance(frontier)
        indirect = whole(store=second, keep=third)
        assert all(map(third.reaches, range(5)))
        assert len(list(store.folder.iterdir())) <= 5 + 2  # of each batch one, and two to write over
    finally:
        store.close()
    assert torch.equal(direct.moments(state)[0].gram, indirect.moments(state)[0].gram)
    assert torch.equal(direct.moments(state)[0].cross, indirect.moments(state)[0].cross)


def test_nan_activations_name_the_layer(network: tuple) -> None:  # type: ignore[type-arg]
    _, program, state, groups = network
    broken = {**state, "hidden.bias": torch.full_like(state["hidden.bias"], float("inf"))}
    found = recorder(groups["hidden"], state, positions=0)
    record_moments(program, [found], lambda number: batches()[number], [4], broken)
    with pytest.raises(NonFiniteError, match="hidden"):
        found.moments(broken)


def test_every_linear_row_is_taken_and_conv_positions_follow_the_cost(network: tuple) -> None:  # type: ignore[type-arg]
    _, _, state, groups = network
    readings = find_readings(groups["first"], state)
    assert plan_samples(readings, [16, 16], 10_000, 10**9).positions == (16, 16)
    assert plan_samples(readings, [16, 16], 30_000, 1000).positions == (1, 1)
    linear = find_readings(groups["hidden"], state)
    assert plan_samples(linear, [1], 123, 1000) == SamplePlan(123, (0,))


def test_rows_are_spread_over_many_samples_however_many_positions_each_has(network: tuple) -> None:  # type: ignore[type-arg]
    _, _, state, groups = network
    readings = find_readings(groups["first"], state)
    few = plan_samples(readings, [10_000, 10_000], 500, 10**9)
    assert few.samples == 500
    assert max(few.positions) < 1000
    assert plan_samples(readings, [10_000, 10_000], 50_000, 10**9).samples == 1024
    half = plan_samples(readings, [10_000, 10_000], 500, 10**9, 0.5)
    assert [2 * count for count in half.positions] == list(few.positions)


def test_a_reading_of_many_columns_takes_no_more_rows_than_columns_where_the_network_is_small(
    network: tuple,  # type: ignore[type-arg]
) -> None:
    _, _, state, groups = network
    (reading, *_) = find_readings(groups["first"], state)
    wide = replace(reading, positions=torch.arange(1024)[:, None])
    columns = wide.columns
    small, large = (plan_samples([wide], [10**6], 1000, macs) for macs in (10**6, 10**12))
    assert columns <= small.samples * small.positions[0] < 1.1 * columns
    assert large.samples * large.positions[0] >= 8 * columns


@pytest.mark.parametrize(("width", "dilation"), [(4, 1), (2, 3), (3, 1)])
def test_a_same_padded_window_is_read_at_every_output_position(width: int, dilation: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, width, padding="same", dilation=dilation, bias=False)
    ).eval()
    images = torch.randn(2, 2, 6, 5)
    graph = trace_network(module, (images,))
    (reading,) = find_readings(find_units(graph, module)[0], dict(module.state_dict()))
    (consumer,) = reading.consumers
    with torch.no_grad():
        hidden = module[:2](images)
        wanted = module[2](hidden).permute(0, 2, 3, 1).reshape(-1, 3).double()
    rows = read_rows(reading, reading.sites[0], hidden, None).double()
    torch.testing.assert_close(
        rows @ reading.whole_matrix(consumer, module.state_dict()["2.weight"]), wanted, atol=1e-6, rtol=1e-5
    )


def test_stored_values_come_back_bit_by_bit_in_their_layout() -> None:
    store = ActivationStore.open(2**26).advance(("a", "b", "c"))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 4, 5, generator=generator).contiguous(memory_format=torch.channels_last)
    rows = torch.randn(6, 7, generator=generator)
    values = {"a": (image, image), "b": (rows.T, rows.bfloat16()), "c": (torch.arange(3), torch.tensor(True))}
    try:
        for batch in range(4):  # files are written over
            assert store.put(batch, values)
            found = store.get(batch, torch.device("cpu"))
            assert found is not None
            for name, pair in values.items():
                for value, other in zip(found[name], pair, strict=True):
                    assert torch.equal(value, other)
                    assert (value.dtype, value.stride()) == (other.dtype, other.stride())
            assert found["a"][0] is found["a"][1]
            if batch % 2:
                store.drop(batch)
                store.drop(batch - 1)
        assert len(list(store.folder.iterdir())) <= 2
    finally:
        store.close()
    assert not store.folder.exists()


def test_what_exceeds_the_bound_is_not_kept() -> None:
    store = ActivationStore.open(100).advance(("a",))
    try:
        value = torch.zeros(20)
        assert store.put(0, {"a": (value, value)})
        assert not store.put(1, {"a": (value, value)})
        assert not store.put(2, {"a": (3, 3)})
        assert store.sizes == {0: 80}
    finally:
        store.close()


def test_drawn_rows_are_those_of_all_positions_at_their_places(network: tuple) -> None:  # type: ignore[type-arg]
    _, _, state, groups = network
    for whole in find_readings(groups["first"], state):
        for reading in (*restrict_readings([whole], torch.tensor([1, 4])), whole):
            (site,) = reading.sites
            inputs = torch.randn(3, 6, 9, 8, generator=torch.Generator().manual_seed(2))
            everything = read_rows(reading, site, inputs, None, own=True).reshape(3, -1, reading.columns)
            index = torch.rand(3, everything.shape[1], generator=torch.Generator().manual_seed(3)).topk(5, 1).indices
            drawn = read_rows(reading, site, inputs, index, own=True).reshape(3, 5, -1)
            assert torch.equal(drawn, everything.gather(1, index[:, :, None].expand(-1, -1, reading.columns)))
