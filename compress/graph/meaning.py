"""What the operations of a network mean, by their rules: its linear maps, its batch normalisations."""

from __future__ import annotations

from torch import fx

from compress.graph.ops import BatchNorm, Identity, LinearMap, Meaning, Rearrangement, Recast, operation_name
from compress.graph.program import Program
from compress.graph.rules import RULES
from compress.graph.trace import NetworkGraph


def meaning_of(network: NetworkGraph, node: fx.Node) -> Meaning | None:
    """What the node computes; None where no rule says it."""
    rule = RULES.get(operation_name(node)) if node.op == "call_function" else None
    return None if rule is None else rule.read(network, node)


def meaning_of_step(program: Program, name: str) -> Meaning | None:
    """What a step of a program computes; None for one that no node of the graph stands for."""
    node = program.nodes.get(name)
    return None if node is None else meaning_of(program.network, node)


def linear_maps(network: NetworkGraph) -> tuple[LinearMap, ...]:
    """Every linear map that multiplies by a tensor of the network, in execution order."""
    meanings = (meaning_of(network, node) for node in network.graph.nodes)
    return tuple(
        meaning
        for meaning in meanings
        if isinstance(meaning, LinearMap) and meaning.weight is not None and not meaning.indexed
    )


def batch_norms(network: NetworkGraph) -> tuple[BatchNorm, ...]:
    """Every batch normalisation by running statistics, in execution order."""
    meanings = (meaning_of(network, node) for node in network.graph.nodes)
    return tuple(meaning for meaning in meanings if isinstance(meaning, BatchNorm))


def last_operation(program: Program, name: str) -> str:
    """The operation that made a value's numbers, `sigmoid` for one; what only moves or copies them is passed over."""
    while name in program.by_name:
        step = program.by_name[name]
        passed = isinstance(meaning_of_step(program, name), Identity | Recast | Rearrangement)
        if not passed or not step.inputs:
            return operation_name(program.nodes[name]) if name in program.nodes else ""
        name = step.inputs[0]
    return ""
