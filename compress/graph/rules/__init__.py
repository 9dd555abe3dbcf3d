"""One rule for each ATen operation: how the channels of its inputs become those of its output.

A rule takes the channel flow and the node, joins, pins and records what the operation demands, and returns the flow of
the output. `RULES` is the catalogue; an operation that is not in it makes every unit that reaches it unprunable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.graph.rules import contraction, elementwise, indexing, normalisation, reshaping, spatial

RULES: dict[str, Callable[..., Any]] = {
    **elementwise.RULES,
    **contraction.RULES,
    **normalisation.RULES,
    **reshaping.RULES,
    **indexing.RULES,
    **spatial.RULES,
}
