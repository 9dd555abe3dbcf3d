"""Bounds that a user's own measure decides: the smallest network within them, in any unit."""

from __future__ import annotations

import pytest
from torch import nn

import compress
from compress.errors import GateError
from tests.api.test_pruning import Chain, batches, normal, seeded

INPUTS = normal(200, 6, seed=99)
WANTED = seeded(Chain)(INPUTS).detach()


def distance(network: nn.Module) -> float:
    """Mean squared distance from the original's outputs: 0 for the original, more is worse."""
    return float((network(INPUTS) - WANTED).square().mean())


def likeness(network: nn.Module) -> dict[str, float]:
    """1 for the original, less is worse."""
    return {"likeness": 1 / (1 + distance(network)), "size": sum(one.numel() for one in network.parameters())}


def wide_chain() -> nn.Module:
    return seeded(Chain)


def pruned(**options: object) -> compress.PruneResult:
    return compress.prune(wide_chain(), batches(12), progress=False, **options)  # type: ignore[arg-type]


def test_the_smallest_network_within_the_bound_is_searched_for() -> None:
    tight, loose = (pruned(evaluate=distance, higher_is_better=False, max_drop=most) for most in (1e-3, 0.05))
    for result, most in ((tight, 1e-3), (loose, 0.05)):
        before, after = result.metrics["metric"]
        assert before == 0
        assert 0 < after <= most
        assert [gate.passed for gate in result.report.gates] == [True]
        assert result.report.search is not None
    assert loose.report.cost.parameters.after < tight.report.cost.parameters.after


def test_a_share_of_the_value_is_a_bound_too() -> None:
    result = pruned(evaluate=likeness, max_drop="2%")
    before, after = result.metrics["likeness"]
    assert before == 1
    assert 0.98 <= after < 1
    assert result.metrics["size"][1] < result.metrics["size"][0]


def test_what_no_cut_keeps_is_a_failed_gate_that_tells_what_was_lost() -> None:
    whole = sum(one.numel() for one in Chain().parameters())

    def size(network: nn.Module) -> float:
        return sum(one.numel() for one in network.parameters()) - whole

    with pytest.raises(GateError, match=r"No cut stayed within the 0 that may be lost; the last one lost \d"):
        pruned(evaluate=size, max_drop=0)


def test_a_budget_and_a_bound_are_both_kept_or_the_gate_fails() -> None:
    result = pruned(evaluate=likeness, max_drop=0.5, macs=0.7)
    assert result.report.cost.macs.after <= 0.7 * result.report.cost.macs.before
    with pytest.raises(GateError, match="worsens by"):
        pruned(evaluate=likeness, max_drop=1e-9, macs=0.3)


def test_a_measure_that_forgets_its_number_is_told_of() -> None:
    def forgetful(network: nn.Module) -> dict[str, float]:
        return {"likeness": 1.0} if sum(one.numel() for one in network.parameters()) > 600 else {"other": 1.0}

    with pytest.raises(compress.CompressError, match="`likeness`"):
        pruned(evaluate=forgetful, keep=0.5)
