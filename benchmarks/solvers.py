"""Seconds to a certified relative duality gap of 1e-6: our Newton solver and the peers, on problems like A, B and C.

easy: ReLU features, K 64 and 512, D 10, from large λ on, where peers may win; A: K 512, D 10, near-duplicate units;
B: K 1024, D 256; C: K 4096, D 1000; E: K 4096, D 4096; conv: K 512, s 9, D 512;
VGG-19: real moments. λ as a fraction of λ_max. Peers get the compressed K-row design XᵀX = G, XᵀY = H and tighter and
tighter tolerances until our certificate of their point is below 1e-6; the time is that of the one call that reached
it. A peer that does not get there within the limit gives "> limit" with the best gap it reached.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accelerator import run_accelerator
from benchmarks.peers import PEERS, Peer
from benchmarks.problems import conv_moments, problem_moments
from benchmarks.recorded import load_moments, save_moments, vgg_moments
from benchmarks.reporting import Cell, Run, best_time, start
from compress.convex import Moments, MultitaskLasso, penalty_grid, solve, solve_path

TOLERANCE = 1e-6


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--limit", type=float, default=None, help="seconds a peer gets per problem (15; quick: 1.5)")
    parser.add_argument("--moments", type=Path, help="moments of VGG-19 layers (.pt); written if --checkpoint is given")
    parser.add_argument("--checkpoint", type=Path, help="the shared vgg19-cifar10.pt, to record the moments")
    parser.add_argument("--images", type=Path, help="CIFAR-10 training images, .npz with `images`")
    parser.add_argument("--peers", help="peers to run, by comma; empty for none (quick: celer, scikit-learn)")
    parser.add_argument("--only", default="", help="problems to run, by comma (easy,A,B,C,E,conv,vgg,path,gpu)")
    parser.add_argument("--device", help="where the gpu part runs; default: cuda where there is one")


def main() -> int:
    run = start("solvers", __doc__, add_options=add_options)
    quick = run.quick
    limit = run.options.limit or (1.5 if quick else 15.0)
    only = set(filter(None, run.options.only.split(",")))
    scale = 0.5 if quick else 1.0
    if quick:
        run.say("quick: K and D of A and B halved; C, E and conv at an eighth to a quarter; two of six peers")
    run.say(f"peers: {limit:g} s a problem; every time is the best of 3 calls, of more where they fit into .1 s;")
    run.say("ours includes the certificate")

    def wanted(name: str) -> bool:
        return not only or name in only

    if wanted("easy"):
        easy(run, limit)
    if wanted("A") or wanted("B"):
        compare(run, limit, scale, [name for name in ("A", "B") if wanted(name)])
    if wanted("C") or wanted("E"):
        large(run, quick)
    if wanted("path"):
        path(run, scale)
    if wanted("conv"):
        conv(run, quick)
    if wanted("vgg"):
        real(run)
    if wanted("gpu"):
        device = run.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        run_accelerator(run, device, 0.0625 if quick else 1.0)
    return run.finish()


def penalised(moments: Moments, fraction: float) -> MultitaskLasso:
    return MultitaskLasso(moments, fraction * MultitaskLasso(moments, 0.0).lambda_max)


def timed(problem: MultitaskLasso) -> tuple[float, int, float, bool]:
    seconds, solution = best_time(lambda: solve(problem, tolerance=TOLERANCE), at_most=5.0)
    return seconds, solution.active.numel(), solution.gap, solution.certified


EASY = (0.7, 0.3, 0.1, 1e-2, 1e-3)


def easy(run: Run, limit: float) -> None:
    """Small problems from large λ on, where a peer may win: from moments (peers: XᵀX = G), and from the rows."""
    names = [
        name for name in (run.options.peers or "celer,scikit-learn").split(",") if name in ("celer", "scikit-learn")
    ]
    rows: list[list[Cell]] = []
    behind: dict[str, list[float]] = {"moments": [], "rows": []}
    for units in (64, 512):
        generator = torch.Generator().manual_seed(units)
        inputs = torch.randn(2000, 20, generator=generator, dtype=torch.float64)
        features = (inputs @ torch.randn(20, units, generator=generator, dtype=torch.float64)).relu()
        outputs = features @ torch.randn(units, 10, generator=generator, dtype=torch.float64)
        moments = Moments.of(features, outputs)
        recorded, _ = best_time(lambda features=features, outputs=outputs: Moments.of(features, outputs))
        raw = (features / len(features) ** 0.5, outputs / len(outputs) ** 0.5)
        for fraction in EASY:
            problem = penalised(moments, fraction)
            solve(problem, tolerance=TOLERANCE)
            seconds, active, gap, certified = timed(problem)
            for source, ours, design in (("moments", seconds, None), ("rows", seconds + recorded, raw)):
                row: list[Cell] = [f"K {units} {fraction:g}", source, active, ours, gap if certified else f"{gap:.0e}"]
                for name in names:
                    cell, theirs, reached = run_peer(Peer(name), problem, limit, design)
                    row.append(cell)
                    if name == "celer" and reached and theirs and units == 64 and fraction >= 0.1:
                        behind[source].append(ours / theirs)
                rows.append(row)
    header = ("K, λ/λ_max", "from", "active", "ours, s", "our gap", *names)
    run.table("Easy problems, seconds to the same gap", header, rows)
    for source, ratios in behind.items():
        note = "λ ≥ .1 λ_max, D 10"
        run.goal(f"easy-K-64-from-{source}-slower-than-celer", max(ratios, default=None), 2.0, unit="x", note=note)


def compare(run: Run, limit: float, scale: float, names: list[str]) -> None:
    cases = {"A": (1e-2, 1e-3, 1e-4, 1e-5), "B": (0.05, 0.01, 0.001)}
    against = {("A", 1e-2), ("A", 1e-3), ("B", 0.01)} | (set() if run.quick else {("B", 0.05)})
    chosen = run.options.peers if run.options.peers is not None else ",".join(PEERS[:2] if run.quick else PEERS)
    peers = [name for name in chosen.split(",") if name]
    rows: dict[tuple[str, float], list[Cell]] = {}
    ours: dict[tuple[str, float], float] = {}
    fastest: dict[tuple[str, float], tuple[float, bool, str]] = {}
    problems = {}
    for name in names:
        moments = problem_moments(name, scale=scale)
        for fraction in cases[name]:
            key = (name, fraction)
            problems[key] = penalised(moments, fraction)
            seconds, active, gap, certified = timed(problems[key])
            ours[key] = seconds
            rows[key] = [f"{name} {fraction:g}", active, seconds, gap if certified else f"{gap:.0e} not certified"]
    for peer_name in peers:
        peer: Peer | None = Peer(peer_name)
        for key, problem in problems.items():
            if key not in against:
                rows[key].append(None)
                continue
            cell, seconds, reached = run_peer(peer, problem, limit)
            rows[key].append(cell)
            if seconds is not None:
                before = fastest.get(key)
                if before is None or (reached, -seconds) > (before[1], -before[0]):
                    fastest[key] = (seconds, reached, peer_name)
        if peer is not None:
            peer.close()
    run.table(
        f"Seconds to a certified gap of {TOLERANCE:g} (K, D × {scale:g})",
        ("problem, λ/λ_max", "active", "ours, s", "our gap", *peers),
        list(rows.values()),
    )
    goals = {("A", 1e-3): 100.0, ("B", 0.01): 100.0, ("A", 1e-2): 20.0}
    for key, factor in goals.items():
        if key in fastest:
            seconds, reached, who = fastest[key]
            at_most = f"fastest peer {who}" if reached else f"no peer within {limit:g} s, a lower bound"
            asked = factor if not run.quick else factor / 5
            note = at_most if not run.quick else f"{at_most}; quick sizes, a fifth of the goal asked"
            run.goal(f"speedup-{key[0]}-{key[1]:g}", seconds / ours[key], asked, at_least=True, unit="x", note=note)


def run_peer(
    peer: Peer | None, problem: MultitaskLasso, limit: float, rows: tuple[Tensor, Tensor] | None = None
) -> tuple[str, float | None, bool]:
    """What the table says of a peer, its seconds (or the limit), and whether it reached the gap.

    `rows`: Φ/√N and Ψ/√N, to solve from; by default the compressed design.
    """
    assert peer is not None
    if rows is not None:
        return _timed_peer(peer, problem, limit, *rows)
    values, vectors = torch.linalg.eigh(problem.moments.gram)
    kept = values > 1e-14 * values[-1]
    design = values[kept].sqrt()[:, None] * vectors[:, kept].T
    targets = (vectors[:, kept].T @ problem.moments.cross) / values[kept].sqrt()[:, None]
    return _timed_peer(peer, problem, limit, design, targets)


def _timed_peer(
    peer: Peer, problem: MultitaskLasso, limit: float, design: Tensor, targets: Tensor
) -> tuple[str, float | None, bool]:
    best, at = float("inf"), 0.0
    try:
        for seconds, found in peer.solve(design.numpy(), targets.numpy(), problem.penalty, limit):
            gap = problem.duality_gap(torch.as_tensor(found, dtype=torch.float64).contiguous())
            if gap < best:
                best, at = gap, seconds
            if gap <= TOLERANCE and seconds <= limit:
                peer.close()
                return f"{seconds:.3g}", seconds, True
    except RuntimeError as error:
        return f"not run: {error}"[:60], None, False
    reached = "no point" if best == float("inf") else f"gap {best:.0e} at {at:.2g} s"
    return f"> {limit:g} ({reached})", limit, False


def large(run: Run, quick: bool) -> None:
    rows: list[list[Cell]] = []
    slowest: dict[float, float] = {}
    for name, fractions in (("C", (0.1, 0.01, 0.001)), ("E", (0.05, 0.01))):
        moments = problem_moments(name, scale=0.125 if quick else 1.0)
        for fraction in fractions:
            begin = time.perf_counter()
            solution = solve(penalised(moments, fraction), tolerance=TOLERANCE)
            seconds = time.perf_counter() - begin
            shape = f"K {moments.unit_count}, D {moments.output_count}"
            rows.append(
                [f"{name} {fraction:g}", shape, solution.active.numel(), seconds, solution.gap, solution.message]
            )
            if name == "C":
                slowest[fraction] = seconds if solution.certified else float("inf")
    run.table("Large problems", ("problem, λ/λ_max", "size", "active", "seconds", "gap", "status"), rows)
    for fraction, wanted in ((0.1, 2.0), (0.001, 10.0)):
        note = "an eighth of the size" if quick else ""
        run.goal(f"C-at-{fraction:g}", slowest[fraction], wanted, unit=" s", note=note)
    run.goal("E-completed", len([row for row in rows if str(row[0]).startswith("E")]), 2, at_least=True)


def path(run: Run, scale: float) -> None:
    moments = problem_moments("A", scale=scale)
    seconds, solutions = best_time(lambda: solve_path(moments, penalty_grid(moments, 20)), at_most=5.0)
    certified = sum(solution.certified for solution in solutions)
    units = [solution.active.numel() for solution in solutions]
    run.table(
        "Path of 20 λ down to 1e-3 λ_max on A",
        ("seconds", "certified", "active, first to last"),
        [[seconds, f"{certified} of 20", f"{units[0]} … {units[9]} … {units[-1]}"]],
    )
    run.goal("path-certified", certified, 20, at_least=True)


def conv(run: Run, quick: bool) -> None:
    units, outputs = (128, 128) if quick else (512, 512)
    moments = conv_moments(units, 9, outputs)
    rows: list[list[Cell]] = []
    for fraction in (0.1, 0.03, 0.01):
        begin = time.perf_counter()
        solution = solve(penalised(moments, fraction), tolerance=TOLERANCE)
        seconds = time.perf_counter() - begin
        rows.append([fraction, solution.active.numel(), seconds, solution.gap, solution.status.value])
    run.table(
        f"Conv groups: K {units}, s 9, D {outputs}", ("λ/λ_max", "active units", "seconds", "gap", "status"), rows
    )
    run.goal("conv-certified", sum(row[4] == "certified" for row in rows), 3, at_least=True)


def real(run: Run) -> None:
    options = run.options
    if options.moments and options.moments.exists():
        layers = load_moments(options.moments)
    elif options.checkpoint and options.images:
        layers = vgg_moments(options.checkpoint, options.images)
        if options.moments:
            save_moments(options.moments, layers)
    else:
        run.goal("vgg-certified", None, "all", note="needs --moments, or --checkpoint and --images")
        return
    rows: list[list[Cell]] = []
    for name, moments in layers.items():
        if run.quick and moments.gram.shape[0] > 1024:
            continue
        for fraction in (0.1, 0.01, 0.001):
            begin = time.perf_counter()
            solution = solve(penalised(moments.centred(), fraction), tolerance=TOLERANCE)
            seconds = time.perf_counter() - begin
            size = f"K {moments.unit_count}, s {moments.group_size}, D {moments.output_count}"
            rows.append([name, size, fraction, solution.active.numel(), seconds, solution.gap, solution.status.value])
    header = ("input of", "size", "λ/λ_max", "active units", "seconds", "gap", "status")
    run.table("Real moments: VGG-19 on CIFAR-10 (centred)", header, rows)
    run.goal("vgg-certified", sum(row[-1] == "certified" for row in rows), len(rows), at_least=True)


if __name__ == "__main__":
    sys.exit(main())
