"""Ways of choosing which units of a network stay at a wanted share of its multiply-accumulates: ours and the peers'.

Every method ends in group name -> kept units of one and the same set of groups, so that all are cut by the same
surgery, refitted by the same least squares where the row says so, and counted by the same cost model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.compression.layers.layer import LayerOptions, layer_unit_costs
from compress.compression.pricing.costs import CostModel
from compress.compression.problem import Problem
from compress.convex import select_units
from compress.recording.layer_moments import LayerMoments

Kept = dict[str, Tensor]
STEPS = 12  # of a bisection


def share_of_macs(model: CostModel, kept: Mapping[str, Tensor]) -> float:
    """MACs that stay, as a fraction of the original's."""
    return model.macs({name: len(units) for name, units in kept.items()}) / model.macs({})


def bisect_to_macs(model: CostModel, at: Callable[[float], Kept], wanted: float) -> Kept:
    """The kept units of the largest fraction (0..1) whose MACs stay within `wanted`."""
    low, high, best = 0.0, 1.0, at(0.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        kept = at(middle)
        if share_of_macs(model, kept) <= wanted:
            low, best = middle, kept
        else:
            high = middle
    return best


def uniform(orders: Mapping[str, Callable[[int], Tensor]], problem: Problem) -> Callable[[float], Kept]:
    """The same fraction of every group's units, at least one; `orders` gives the units of a group at a width."""

    def at(fraction: float) -> Kept:
        kept = {}
        for group in problem.groups:
            width = max(1, round(fraction * group.unit_count / group.blocks)) * group.blocks
            kept[group.name] = orders[group.name](width)
        return kept

    return at


def orders_by_selection(problem: Problem, moments: Mapping[str, LayerMoments], method: str) -> dict:
    """Units by width from one of our selection methods, on the moments of the original network."""
    found = {}
    for group in problem.groups:
        joint = moments[group.name].joint()
        costs = layer_unit_costs("one", group, moments[group.name], problem.state, joint)
        curve = select_units(joint, method=method, unit_costs=costs, ridge=LayerOptions().ridge, intercept=False)
        found[group.name] = curve.units
    return found


def orders_by_magnitude(problem: Problem) -> dict:
    """Units by width, those first whose weights have the largest sum of absolute values (Li et al. 2017)."""
    found = {}
    for group in problem.groups:
        sums = torch.zeros(group.unit_count, dtype=torch.float64)
        for part in group.slices:
            weight = problem.state[part.name]
            if part.dim == 0 and weight.ndim > 1:
                sums += weight.abs().double().flatten(1).sum(1).cpu()[part.positions].sum(1)
        order = sums.argsort(descending=True)
        found[group.name] = lambda width, order=order: order[:width].sort().values
    return found


def orders_by_thinet(problem: Problem, moments: Mapping[str, LayerMoments]) -> dict:
    """ThiNet's greedy (Luo et al. 2017): next goes the unit with which the removed ones together add least to Ψ."""
    found = {}
    for group in problem.groups:
        own = moments[group.name]
        shares = torch.zeros(group.unit_count, group.unit_count, dtype=torch.float64)
        for reading, part in zip(own.readings, own.fitting, strict=True):
            weights = reading.weights(problem.state)  # (K·s, D)
            s = reading.group_size
            product = part.gram * (weights @ weights.T).to(part.gram)
            shares += product.reshape(group.unit_count, s, group.unit_count, s).sum((1, 3)).cpu()
        removed = torch.zeros(group.unit_count, dtype=torch.float64)
        order = []
        left = torch.ones(group.unit_count, dtype=torch.bool)
        for _ in range(group.unit_count):
            energy = shares.diagonal() + 2 * (shares @ removed)
            energy[~left] = torch.inf
            unit = int(energy.argmin())
            removed[unit], left[unit] = 1.0, False
            order.append(unit)
        kept_first = torch.tensor(order[::-1])
        found[group.name] = lambda width, kept_first=kept_first: kept_first[:width].sort().values
    return found


def equal_errors(problem: Problem, moments: Mapping[str, LayerMoments], method: str) -> Callable[[float], Kept]:
    """Units at one relative error for all layers (the interpolative decomposition's rule); 1 keeps all, 0 one unit."""
    curves = {}
    for group in problem.groups:
        joint = moments[group.name].joint()
        curves[group.name] = select_units(joint, method=method, ridge=LayerOptions().ridge, intercept=False)

    def at(fraction: float) -> Kept:
        error = 10.0 ** (-6 * fraction)
        return {name: curve.units(max(1, curve.width_for(error))) for name, curve in curves.items()}

    return at


def torch_pruning(
    module: nn.Module,
    probe: Tensor,
    problem: Problem,
    importance: str,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    isomorphic: bool = False,
) -> Callable[[float], Kept]:
    """Torch-Pruning's own choice at a global pruning ratio, read from its pruning history.

    Args:
        importance: "magnitude", "bnscale" or "taylor".
        batches: (inputs, labels) for the gradients that "taylor" needs.
    """
    import torch_pruning as tp

    owner: dict[str, str] = {}
    for group in problem.groups:
        for part in group.slices:  # also of depthwise layers: those are what the history names
            if part.dim == 0 and torch.equal(part.positions, torch.arange(group.unit_count)[:, None]):
                owner[part.name.rpartition(".")[0]] = group.name
    makers = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "bnscale": lambda: tp.importance.BNScaleImportance(),
        "taylor": lambda: tp.importance.GroupTaylorImportance(),
    }
    classes = int(module(probe).shape[1])
    gradients = loss_gradients(module, batches) if importance == "taylor" else {}

    def at(fraction: float) -> Kept:
        own = copy.deepcopy(module).eval()
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(True)
            parameter.grad = gradients[name].clone() if name in gradients else None
        last = [layer for layer in own.modules() if isinstance(layer, nn.Linear) and layer.out_features == classes]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                own,
                probe[:1],
                importance=makers[importance](),
                global_pruning=True,
                pruning_ratio=1 - fraction,
                max_pruning_ratio=0.95,
                ignored_layers=last[-1:],
                isomorphic=isomorphic,
            )
            pruner.step()
        kept = {group.name: torch.arange(group.unit_count) for group in problem.groups}
        for name, _, removed in pruner.pruning_history():
            group = owner.get(name)
            if group is None:
                continue
            gone = set(removed)
            kept[group] = torch.tensor([unit for unit in kept[group].tolist() if unit not in gone])
        return kept

    return at


def loss_gradients(module: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Gradient of the summed cross-entropy by parameter name."""
    own = copy.deepcopy(module).eval()
    for parameter in own.parameters():
        parameter.requires_grad_(True)
    for inputs, labels in batches:
        nn.functional.cross_entropy(own(inputs), labels).backward()
    return {name: parameter.grad for name, parameter in own.named_parameters() if parameter.grad is not None}
