"""Rows of values at some of their positions, whichever way the values lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_at(value: Tensor, index: Tensor | None) -> Tensor:
    """Rows (B·P, C) of a value (B, C, …) at positions `index` (B, P) in row-major order; None: at all of them."""
    if index is None:
        return value.flatten(2).transpose(1, 2).reshape(-1, value.shape[1])
    if has_channels_last(value):
        return picked_rows(value, index)
    picked = value.flatten(2).gather(2, index[:, None].expand(-1, value.shape[1], -1))
    return picked.transpose(1, 2).reshape(-1, value.shape[1])


def picked_rows(value: Tensor, index: Tensor) -> Tensor:
    """The same of a value whose channels lie together: rows of memory as they are."""
    rows = value.movedim(1, -1).reshape(-1, value.shape[1])
    first = torch.arange(len(value), device=index.device)[:, None] * (len(rows) // max(1, len(value)))
    return rows.index_select(0, (index + first).flatten())


def has_channels_last(value: Tensor) -> bool:
    """Whether the channels of a value (B, C, …) lie together."""
    return value.ndim > 2 and value.shape[1] > 1 and value.movedim(1, -1).is_contiguous()
