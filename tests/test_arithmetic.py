"""A run's arithmetic: the caller's settings and random numbers are as they were, whatever happens within."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compress
from compress.arithmetic import fix_algorithms, fix_precision, reproducible


def settings() -> tuple[object, ...]:
    """What a run may change on a machine with CUDA."""
    cudnn = torch.backends.cudnn
    return (
        cudnn.allow_tf32,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.backends.cuda.matmul.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


def test_settings_are_fixed_and_put_back() -> None:
    before = settings()
    undo = [fix_algorithms(), fix_precision()]
    assert settings() == (False, False, True, False, True, True, False, False, False, False)
    for put_back in undo:
        put_back()
    assert settings() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the older settings alone")
def test_settings_made_in_the_newer_way_are_put_back_in_it() -> None:
    places = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        places[0].fp32_precision, places[1].fp32_precision = "ieee", "tf32"  # which the older ones cannot say
        put_back = fix_precision()
        assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
        put_back()
        assert [place.fp32_precision for place in places] == ["ieee", "tf32"]
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def test_random_numbers_of_the_caller_go_on() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)

    @reproducible()
    def fail() -> None:
        torch.manual_seed(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.rand(3), wanted)


def test_a_module_pruned_in_memory_leaves_the_random_numbers_alone() -> None:
    module = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)).eval()
    batches = [torch.randn(16, 4) for _ in range(4)]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    compress.prune(module, batches, keep=0.5, progress=False)
    assert torch.equal(torch.rand(3), wanted)
