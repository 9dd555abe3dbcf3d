"""Tabu search for the units to keep: the best exchange again and again, also where it loses, with short-term memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_CHAINS = 4
_STEPS = 20  # fewer steps than these find nothing
_STAYS_OUT, _STAYS_IN = 8, 1  # steps for which a unit may not come back, or leave; a random few more
_PATIENCE = 50  # steps, and one a unit, without a record of its own after which a chain starts anew at random
_REFRESH = 50  # exchanges after which the arrays are computed anew, to drop their rounding
_RELATIVE_GAIN = 1e-9  # of the output energy: what counts as better
_OVERHEAD = 2e6  # multiplications in the time that the calls of one step take besides them


def tabu_search(
    gram: Tensor, targets: Tensor, starts: Sequence[Tensor], *, budget: float, floor: float, seed: int = 0
) -> Tensor:
    """The units (m,) that explain most of the targets, of all selections that a few chains of exchanges come by.

    Every chain makes the exchange of one unit for another that explains most, of those that do not undo what it did
    in the last few steps (Glover 1989); where all of them lose, the one that loses least. A chain can so leave a
    selection that no exchange improves, and one step costs O(m·K). A chain that has set no record of its own for long
    goes on from a random selection.

    Args:
        gram: (K, K), ridged, unit diagonal. targets: (K, D).
        starts: selections (m,) of equally many units, fewer than K; chains start from them in turn.
        budget: multiplications that may be spent.
        floor: the smallest Schur complement that is not rounding: the ridge.
        seed: of the lengths of the memory and of what chains go on from.
    """
    device, count, width = gram.device, gram.shape[0], starts[0].shape[0]
    generator = torch.Generator().manual_seed(seed)
    number = next((r for r in (_CHAINS, 1) if _work(r, width, *targets.shape) * _STEPS <= budget), 0)
    if number == 0:
        return starts[0]
    chains = Chains(gram, targets, torch.stack([starts[i % len(starts)] for i in range(number)]), floor)
    stays_out = max(1, min(_STAYS_OUT, (count - width) // 2))
    stays_in = min(_STAYS_IN, width // 2)
    lengths = torch.tensor([stays_out, stays_in])
    spare = torch.tensor([max(1, stays_out // 2), 1 + min(2, width // 4)])
    free_at = torch.zeros(number, count, device=device)  # the step from which on a unit may come in
    loose_at = torch.zeros(number, width, device=device)  # the step from which on a place may be given up
    rows = torch.arange(number, device=device)
    energy = float(targets.square().sum())
    best, units = -math.inf, starts[0]
    record, since = chains.explained.clone(), torch.zeros(number, device=device)  # of every chain, and when it was set
    spent, step, work = 0.0, 0, _work(number, width, *targets.shape)
    while True:
        place = int(chains.explained.argmax())
        if float(chains.explained[place]) > best + _RELATIVE_GAIN * energy:
            explained = chains.exact(place)
            if explained > best:
                best, units = explained, chains.units[place].clone()
        if spent >= budget:
            return units
        step += 1
        gains = chains.gains()
        tabu = (free_at > step)[:, None, :] | (loose_at > step)[:, :, None]
        tabu &= chains.explained[:, None, None] + gains <= best + _RELATIVE_GAIN * energy
        choice = gains.sub_(tabu.to(gains), alpha=1e3 * energy).reshape(number, -1).argmax(1)
        out, into = choice // count, choice % count
        memory = lengths + (torch.rand(number, 2, generator=generator) * (spare + 1)).floor()
        memory = (memory + step + 1).to(device)
        free_at[rows, chains.units[rows, out]] = memory[:, 0]
        loose_at[rows, out] = memory[:, 1]
        chains.exchange(out, into)
        better = chains.explained > record + _RELATIVE_GAIN * energy
        record, since = torch.where(better, chains.explained, record), torch.where(better, step, since)
        if step % _REFRESH == 0:
            stale = (since <= step - _PATIENCE - width).nonzero()[:, 0].tolist()
            for chain in stale:
                chains.units[chain] = torch.randperm(count, generator=generator)[:width].to(device)
            chains.refresh(units)
            record[stale], since[stale] = chains.explained[stale], float(step)
            free_at[stale], loose_at[stale] = 0.0, 0.0
        spent += work


def _work(chains: int, width: int, count: int, outputs: int) -> float:
    """Multiplications of a step, as its time is worth."""
    return _OVERHEAD + chains * (20.0 * width * count + 4.0 * count * outputs)


class Chains:
    """R selections S of m units each, and what says the gain of every exchange.

    Attributes:
        units: S (R, m). explained: energy (R,) of the targets that they explain.
        inverse: P = G_SS⁻¹ (R, m, m). bridge: B = P·G_S (R, m, K). rows: G_S (R, m, K).
        weights: V = P·H_S (R, m, d). left: C = H − G_:S·V (R, K, d). mixed: 2·V·Cᵀ (R, m, K).
        schur: σ_j = G_jj − G_jS·P·G_Sj (R, K). squares: ‖c_j‖² (R, K).
    """

    def __init__(self, gram: Tensor, targets: Tensor, units: Tensor, floor: float) -> None:
        self.gram, self.targets, self.units, self.floor = gram, targets, units, floor
        self.chain = torch.arange(units.shape[0], device=gram.device)
        self.refresh(units[0])

    def refresh(self, sound: Tensor) -> None:
        """All arrays anew from `units`; chains that rounding led to dependent units go on from the `sound` ones."""
        kept = self.gram[self.units[:, :, None], self.units[:, None, :]]
        factor, info = torch.linalg.cholesky_ex(kept)
        if bool(info.any()):
            self.units = torch.where((info != 0)[:, None], sound, self.units)
            factor = torch.linalg.cholesky(self.gram[self.units[:, :, None], self.units[:, None, :]])
        units = self.units
        self.inside = torch.zeros(units.shape[0], self.gram.shape[0], dtype=torch.bool, device=units.device)
        self.inside.scatter_(1, units, True)
        self.rows = self.gram[units]
        self.inverse = torch.cholesky_inverse(factor)
        self.bridge = torch.bmm(self.inverse, self.rows)
        cross = self.targets[units]
        self.weights = torch.bmm(self.inverse, cross)
        self.left = self.targets - torch.bmm(self.rows.mT, self.weights)
        self.mixed = torch.bmm(self.weights, self.left.mT).mul_(2)
        self.schur = self.gram.diagonal() - (self.rows * self.bridge).sum(1)
        self.squares = self.left.square().sum(2)
        self.explained = (cross * self.weights).sum((1, 2))

    def exact(self, place: int) -> float:
        """What selection `place` explains, computed anew."""
        units = self.units[place]
        factor, info = torch.linalg.cholesky_ex(self.gram[units[:, None], units])
        if int(info):
            return -math.inf
        return float(torch.linalg.solve_triangular(factor, self.targets[units], upper=False).square().sum())

    def gains(self) -> Tensor:
        """Gain (R, m, K) in explained energy of giving up place i for unit j; −∞ for units inside.

        Without i the residual's correlation with j is c_j + t·v_i, t = B_ij/P_ii, and what is left of φ_j has the
        square σ_j + t²P_ii; i itself explained ‖v_i‖²/P_ii.
        """
        pivots = self.inverse.diagonal(dim1=1, dim2=2)[:, :, None]  # P_ii
        energies = self.weights.square().sum(2)[:, :, None]
        share = self.bridge / pivots  # t
        gains = torch.addcmul(self.mixed, share, energies).mul_(share).add_(self.squares[:, None, :])
        share.square_().mul_(pivots).add_(self.schur.clamp_min(self.floor)[:, None, :])
        gains.div_(share).sub_(energies / pivots)
        return gains.masked_fill_(self.inside[:, None, :], -torch.inf)

    def exchange(self, out: Tensor, into: Tensor) -> None:
        """Give up the places `out` (R,) for the units `into` (R,): two sweeps in one pass over every array."""
        r = self.chain
        # without place a: P ← P − P_aP_aᵀ/P_aa, B ← B − P_aB_aᵀ/P_aa, C ← C + B_av_aᵀ/P_aa, …
        pivot = self.inverse[r, out, out][:, None]
        column = self.inverse[r, :, out] / pivot  # (R, m)
        gone, weight, mixed = self.bridge[r, out], self.weights[r, out], self.mixed[r, out] / 2
        energy = weight.square().sum(1, keepdim=True)
        along = torch.bmm(self.weights, weight[:, :, None])[:, :, 0] / pivot - column * (energy / pivot)  # (R, m)
        back = gone / pivot  # (R, K)
        self.explained = self.explained - (energy / pivot)[:, 0]
        self.squares.add_(back * (2 * mixed + back * energy))
        self.schur.add_(back * gone)
        # with unit j in that place: e = (−B_j/σ_j, 1/σ_j), P ← P + σ_j·eeᵀ, B ← B + e·gᵀ, C ← C − g·c_jᵀ/σ_j, …
        beta = self.bridge[r, :, into] - column * gone[r, into][:, None]
        beta[r, out] = 0.0
        schur = self.schur[r, into].clamp_min(self.floor)[:, None]
        enter = -beta / schur
        enter[r, out] = 1 / schur[:, 0]
        grown = self.gram[into] - torch.bmm(beta[:, None, :], self.rows)[:, 0]  # g (R, K)
        new = self.left[r, into] + back[r, into][:, None] * weight  # c_j (R, d)
        square = new.square().sum(1, keepdim=True)
        meets = torch.bmm(self.left, new[:, :, None])[:, :, 0] + back * (weight * new).sum(1, keepdim=True)  # C·c_j
        at = self.mixed[r, :, into] / 2 + along * gone[r, into][:, None] - column * mixed[r, into][:, None]  # V·c_j
        at[r, out] = 0.0
        self.explained = self.explained + (square / schur)[:, 0]
        scaled = grown / schur
        self.squares.sub_(scaled * (2 * meets - scaled * square))
        self.schur.sub_(scaled * grown)
        self.left.baddbmm_(torch.stack([back, -scaled], 2), torch.stack([weight, new], 1))
        self._drop(out)
        column, along = (part.index_put((r, out), part.new_zeros(())) for part in (column, along))
        self.inverse.baddbmm_(torch.stack([column, enter], 2), torch.stack([-column * pivot, enter * schur], 1))
        self.bridge.baddbmm_(torch.stack([column, enter], 2), torch.stack([-gone, grown], 1))
        self.weights.baddbmm_(torch.stack([column, enter], 2), torch.stack([-weight, new], 1))
        self.mixed.baddbmm_(
            torch.stack([along, column, enter, at + enter * square], 2),
            torch.stack([gone, -mixed, meets, -scaled], 1),
            alpha=2,
        )
        self.inside[r, self.units[r, out]] = False
        self.inside[r, into] = True
        self.units[r, out] = into
        self.rows[r, out] = self.gram[into]

    def _drop(self, out: Tensor) -> None:
        """Zero in place `out` of every array: what a unit that left has there."""
        r = self.chain
        self.inverse[r, out] = 0.0
        self.inverse[r, :, out] = 0.0
        self.bridge[r, out] = 0.0
        self.weights[r, out] = 0.0
        self.mixed[r, out] = 0.0
