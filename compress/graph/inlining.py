"""Regions that torch.export wraps in a sub-graph (no gradients, autocast switched off), put back in line."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx


def inline_regions(module: fx.GraphModule) -> None:
    """Replace every such call in the module's graph, in place, by the nodes of its sub-graph, nested ones included."""
    while True:
        calls = [node for node in module.graph.nodes if _region(node) is not None]
        if not calls:
            return
        for node in calls:
            _inline(module, node)


def _region(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """The sub-graph of a call that changes nothing in evaluation, and its inputs."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == "wrap_with_set_grad_enabled":
        return node.args[1], node.args[2:]  # type: ignore[return-value]
    if name == "wrap_with_autocast" and node.args[2] is False:
        return node.args[4], node.args[5:]  # type: ignore[return-value]
    return None


def _inline(module: fx.GraphModule, call: fx.Node) -> None:
    region = _region(call)
    if region is None:
        return
    holder, inputs = region
    inner = operator.attrgetter(str(holder.target))(module)
    prefix = str(holder.target)
    copies: dict[fx.Node, Any] = {}
    given = iter(inputs)
    results: Any = ()
    with module.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                results = fx.node.map_arg(node.args[0], copies.__getitem__)
            else:
                copies[node] = module.graph.node_copy(node, copies.__getitem__)
                if node.op == "get_attr":
                    copies[node].target = f"{prefix}.{node.target}"
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(call)
    if not holder.users:
        module.graph.erase_node(holder)
