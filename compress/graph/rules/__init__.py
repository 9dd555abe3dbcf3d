"""One rule for each ATen operation: how the channels of its inputs become those of its output, and what it means.

The first function of a rule takes the channel flow and the node, joins, pins and records what the operation demands,
and returns the flow of the output. The second gives the operation's meaning, a value of `graph/ops`, which everything
else reads: costs, latencies, norms, surgery, recording. `RULES` is the catalogue, by names without the underscore of an
operation in place; an operation that is not in it makes every unit that reaches it unprunable.
"""

from __future__ import annotations

from compress.graph.ops import Rule
from compress.graph.rules import contraction, elementwise, indexing, normalisation, reshaping, spatial

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **contraction.RULES,
    **normalisation.RULES,
    **reshaping.RULES,
    **indexing.RULES,
    **spatial.RULES,
}
