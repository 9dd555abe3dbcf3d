"""What the network costs at given widths, without building it: parameters, multiply-accumulates, latency.

Every tensor's size is a product over its dimensions, each shrinking linearly with the groups cut along it; so each cost
is multilinear in the widths, and exact for parameters and for the multiply-accumulates of linear maps. Products of two
computed values, as of attention, are counted with each group at half of its width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.graph.cost import count_products
from compress.graph.meaning import linear_maps
from compress.graph.program import Program
from compress.units.branches import Branch
from compress.units.groups import UnitGroup
from compress.units.surgery import narrow
from compress.units.trial import RUN_FAULTS

WORTH = 0.01  # of all multiply-accumulates, below which products of computed values are taken for fixed
SLACK = 1e-6  # of them, by which rounding may miss their sum


class Latencies(Protocol):
    """Predicts latency."""

    @property
    def original(self) -> float:
        """Milliseconds of the network before anything was done to it."""

    def milliseconds(self, removed: Mapping[str, int], ranks: Mapping[str, int] | None = None) -> float:
        """Time when so many units of each group are removed, and weights by their names have such ranks."""

    def profile(
        self,
        removed: Mapping[str, int],
        group: str,
        counts: Sequence[int],
        ranks: Mapping[str, int] | None = None,
    ) -> Tensor:
        """Times (n,) of what a group has a part in when `counts` of its units are removed."""

    def of_map(self, removed: Mapping[str, int], weight: str, rank: int) -> float:
        """Time of the map of one weight at a rank."""


@dataclass(frozen=True)
class SizedTensor:
    """One tensor's extent as a function of the widths.

    Attributes:
        shape: full extents.
        cuts: for each dimension the groups that cut it, as (group name, positions per unit).
        uses: multiply-accumulates per sample and element: output positions of the map it belongs to, 0 for none.
    """

    name: str
    shape: tuple[int, ...]
    cuts: tuple[tuple[tuple[str, int], ...], ...]
    uses: float

    def elements(self, removed: Mapping[str, int], rank: int = 0) -> float:
        """Elements left when so many units of each group are removed.

        Args:
            rank: of the two weights in its place, which are taken where they have fewer elements; 0: there are none.
        """
        extents = [
            extent - sum(each * removed.get(group, 0) for group, each in cuts)
            for extent, cuts in zip(self.shape, self.cuts, strict=True)
        ]
        whole = math.prod(extents)
        return min(whole, rank * (extents[0] + whole / extents[0])) if rank and whole else whole


@dataclass(frozen=True)
class Product:
    """Products of two computed values that fall alike with the widths.

    Attributes:
        macs: multiply-accumulates per sample, at full widths.
        shares: group name -> part of them that goes with each of its units.
    """

    macs: float
    shares: Mapping[str, float]

    def left(self, removed: Mapping[str, int]) -> float:
        """What is left of them when so many units of each group are removed."""
        return self.macs * math.prod(1 - share * removed.get(group, 0) for group, share in self.shares.items())


@dataclass(frozen=True)
class CostModel:
    """Costs of a network by the widths of its groups.

    Attributes:
        units: group name -> K.
        tensors: all parameters.
        fixed_macs: multiply-accumulates that no width changes.
        gained: how many of the parameters the original does not have (biases that the refit may use).
        latency: predicts milliseconds from the units removed per group; None where latency was not measured.
        blocks: for each block that may go as a whole the group that has no unit then, and the names of the parameters
            that go with it.
        lowerable: names of the weights that may be given a low rank, which stands among the widths by the weight's name
            (0: none).
        products: of two computed values.
    """

    units: dict[str, int]
    tensors: tuple[SizedTensor, ...]
    fixed_macs: int = 0
    gained: int = 0
    latency: Latencies | None = None
    blocks: tuple[tuple[str, frozenset[str]], ...] = ()
    lowerable: frozenset[str] = frozenset()
    products: tuple[Product, ...] = ()

    @property
    def costs(self) -> tuple[str, ...]:
        """Names of the costs that are known."""
        return ("macs", "params") if self.latency is None else ("macs", "params", "latency")

    def total(self, cost: str, widths: Mapping[str, int]) -> float:
        """One cost at the given widths."""
        if cost == "latency":
            assert self.latency is not None, "asked for only where it was measured"
            return self.latency.milliseconds(self.removed(widths), self.ranks(widths))
        return self.macs(widths) if cost == "macs" else self.parameters(widths)

    def original(self, cost: str) -> float:
        """One cost of the original network."""
        if cost == "latency":
            assert self.latency is not None, "asked for only where it was measured"
            return self.latency.original
        return self.total(cost, {}) - (self.gained if cost == "params" else 0)

    def profile(self, cost: str, widths: Mapping[str, int], group: str, legal: Tensor) -> Tensor:
        """One cost at each legal width (L,) of `group` while the other widths stay, up to a constant."""
        if cost != "latency":
            return self.slope(cost, widths, group) * legal.double()
        assert self.latency is not None, "asked for only where it was measured"
        counts = [self.units[group] - width for width in legal.tolist()]
        return self.latency.profile(self.removed(widths), group, counts, self.ranks(widths))

    def of_weight(self, cost: str, widths: Mapping[str, int], weight: str, rank: int) -> float:
        """One cost of one weight alone, or of the two in its place, at a rank (0: whole)."""
        removed = self.removed(widths)
        if cost == "latency":
            assert self.latency is not None, "asked for only where it was measured"
            return self.latency.of_map(removed, weight, rank)
        tensor = self._by_name[weight]
        return (1 if cost == "params" else tensor.uses) * tensor.elements(removed, rank)

    @cached_property
    def _by_name(self) -> dict[str, SizedTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def _by_group(self) -> dict[str, list[SizedTensor]]:
        """Group name -> the tensors that it cuts."""
        cut: dict[str, list[SizedTensor]] = {}
        for tensor in self.tensors:
            for name in dict.fromkeys(name for cuts in tensor.cuts for name, _ in cuts):
                cut.setdefault(name, []).append(tensor)
        return cut

    def ranks(self, widths: Mapping[str, int]) -> dict[str, int]:
        """The weights that have a low rank, and that rank."""
        return {name: widths[name] for name in self.lowerable if widths.get(name) and name not in self.gone(widths)}

    def gone(self, widths: Mapping[str, int]) -> set[str]:
        """Names of the parameters that go with their blocks."""
        return set().union(*(names for group, names in self.blocks if widths.get(group, 1) == 0))

    def removed(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Units removed per group; a group that is not named keeps all."""
        return {name: count - widths.get(name, count) for name, count in self.units.items()}

    def parameters(self, widths: Mapping[str, int]) -> float:
        """Scalars in parameters."""
        removed, gone, ranks = self.removed(widths), self.gone(widths), self.ranks(widths)
        return sum(
            tensor.elements(removed, ranks.get(tensor.name, 0)) for tensor in self.tensors if tensor.name not in gone
        )

    def macs(self, widths: Mapping[str, int]) -> float:
        """Multiply-accumulates of one sample."""
        removed, ranks = self.removed(widths), self.ranks(widths)
        maps = sum(
            tensor.uses * tensor.elements(removed, ranks.get(tensor.name, 0)) for tensor in self.tensors if tensor.uses
        )
        return self.fixed_macs + maps + sum(product.left(removed) for product in self.products)

    def slope(self, cost: str, widths: Mapping[str, int], group: str) -> float:
        """What one unit of `group` costs while the other widths stay: exact where no tensor is cut twice by it."""
        removed, ranks = self.removed(widths), self.ranks(widths)
        more = {**removed, group: removed[group] + 1}
        products = [product for product in self.products if group in product.shares] if cost == "macs" else []
        total = sum(product.left(removed) - product.left(more) for product in products)
        for tensor in self._by_group.get(group, ()):
            factor = 1 if cost == "params" else tensor.uses
            if factor:
                rank = ranks.get(tensor.name, 0)
                total += factor * (tensor.elements(removed, rank) - tensor.elements(more, rank))
        return total


def cost_model(
    program: Program,
    groups: Sequence[UnitGroup],
    parameters: Mapping[str, Tensor],
    forward_macs: int,
    biases: Sequence[str] = (),
    branches: Sequence[Branch] = (),
    lowerable: Iterable[str] = (),
    products: Sequence[Product] = (),
) -> CostModel:
    """The cost model of a traced network.

    Args:
        parameters: state name -> parameter (no buffers).
        forward_macs: multiply-accumulates of one sample, as measured; what the maps found here do not explain is fixed.
        biases: names of the parameters that the original does not have.
        branches: blocks that may go as a whole; the constant that is left of one counts as nothing.
        lowerable: names of the weights that may be given a low rank.
    """
    cuts: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for group in groups:
        for part in group.slices:
            cuts.setdefault((part.name, part.dim), []).append((group.name, part.positions.shape[1]))
    uses = map_uses(program)
    tensors = tuple(
        SizedTensor(
            name,
            tuple(tensor.shape),
            tuple(tuple(cuts.get((name, dim), ())) for dim in range(tensor.ndim)),
            uses.get(name, 0),
        )
        for name, tensor in parameters.items()
    )
    explained = sum(tensor.uses * math.prod(tensor.shape) for tensor in tensors)
    computed = sum(product.macs for product in products)
    if explained + computed > forward_macs * (1 + SLACK) + 1:  # what computes a weight was taken for a value
        products, computed = (), 0
    return CostModel(
        {group.name: group.unit_count for group in groups},
        tensors,
        max(0, round(forward_macs - explained - computed)),
        sum(parameters[name].numel() for name in biases),
        blocks=tuple((each.end, frozenset(name for name in parameters if each.holds(name))) for each in branches),
        lowerable=frozenset(lowerable),
        products=tuple(products),
    )


def find_products(
    module: nn.Module, examples: Sequence[Tensor], groups: Sequence[UnitGroup], forward_macs: int
) -> tuple[Product, ...]:
    """Products of two computed values that some groups make smaller, those alike together; none where they are few.

    A product falls linearly with each group that it depends on, by what half of the group takes off; where it falls
    faster (a matrix with itself), no more is counted on. A group that cannot be cut alone takes nothing off.
    """
    whole = count_products(module, examples)
    if sum(whole) < WORTH * forward_macs:
        return ()
    shares: list[dict[str, float]] = [{} for _ in whole]
    for group in groups:
        kept = half_of(group)
        gone = 1 - len(kept) / group.unit_count
        if not gone:
            continue
        try:
            counts = count_products(narrow(module, {group.name: kept}, groups).module, examples)
        except RUN_FAULTS:
            continue
        if len(counts) != len(whole):
            continue
        for share, before, after in zip(shares, whole, counts, strict=True):
            if before > after:
                share[group.name] = min(1.0, (before - after) / before / gone)
    alike: dict[tuple[tuple[str, float], ...], float] = {}
    for share, macs in zip(shares, whole, strict=True):
        key = tuple((name, round(part, 6)) for name, part in share.items())
        if key:
            alike[key] = alike.get(key, 0.0) + macs
    units = {group.name: group.unit_count for group in groups}
    return tuple(Product(macs, {name: part / units[name] for name, part in key}) for key, macs in alike.items())


def half_of(group: UnitGroup) -> Tensor:
    """The first half of its units, of each block of a grouped layer; at least one."""
    size = group.unit_count // group.blocks
    first = torch.arange(max(1, size // 2))
    return torch.cat([block * size + first for block in range(group.blocks)])


def map_uses(program: Program) -> dict[str, float]:
    """State name of each weight of a linear map -> how often one sample multiplies each of its elements.

    What is computed once for all samples counts for a part.
    """
    samples = program.network.examples[0].shape[0]
    uses: dict[str, float] = {}
    for linear in linear_maps(program.network):
        assert linear.weight is not None, "linear_maps gives those by a tensor of the network"
        uses[linear.weight] = uses.get(linear.weight, 0.0) + linear.positions / samples
    return uses
