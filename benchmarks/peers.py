"""Other solvers of the multitask lasso, each in a process of its own so that a time limit can be kept.

`python -m benchmarks.peers NAME` reads one job a line from stdin (JSON: path of an .npz with X, Y, penalty and the
limit in seconds) and answers with one JSON line for every tolerance it finishes: seconds of that call (the best of
three short ones), coefficients in an .npz. X (r, K), Y (r, D) is the compressed design, XᵀX = G and XᵀY = H, which is
kinder than the raw samples, where nothing else is said.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from benchmarks.reporting import best_time

PEERS = ("celer", "scikit-learn", "skglm", "adelie", "cvxpy+SCS", "cvxpy+Clarabel")
_TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-12)
_WORTH_REPEATING = 0.3  # seconds
Solver = Callable[[numpy.ndarray, numpy.ndarray, float, float], numpy.ndarray]


def celer(x: numpy.ndarray, y: numpy.ndarray, penalty: float, tolerance: float) -> numpy.ndarray:
    from celer.homotopy import mtl_path

    found = mtl_path(x, y, alphas=[penalty / len(x)], tol=tolerance, max_iter=10_000, max_epochs=100_000)
    return numpy.asarray(found[1])[..., 0].T  # (K, D)


def scikit_learn(x: numpy.ndarray, y: numpy.ndarray, penalty: float, tolerance: float) -> numpy.ndarray:
    from sklearn.linear_model import MultiTaskLasso

    model = MultiTaskLasso(alpha=penalty / len(x), fit_intercept=False, tol=tolerance, max_iter=10_000_000)
    return numpy.asarray(model.fit(x, y).coef_.T)


def skglm(x: numpy.ndarray, y: numpy.ndarray, penalty: float, tolerance: float) -> numpy.ndarray:
    from skglm.datafits import QuadraticMultiTask
    from skglm.penalties import L2_1
    from skglm.solvers import MultiTaskBCD
    from skglm.utils.jit_compilation import compiled_clone

    x, y = numpy.asfortranarray(x), numpy.ascontiguousarray(y)
    datafit, penalty_ = compiled_clone(QuadraticMultiTask()), compiled_clone(L2_1(penalty / len(x)))
    solver = MultiTaskBCD(tol=tolerance * penalty / len(x), max_iter=10_000, max_epochs=100_000, fit_intercept=False)
    return numpy.asarray(solver.solve(x, y, datafit, penalty_)[0])


def adelie(x: numpy.ndarray, y: numpy.ndarray, penalty: float, tolerance: float) -> numpy.ndarray:
    if numpy.array is not _array_without_strict_copy:  # adelie 1.1 means numpy 1's copy=False, "copy if needed"
        numpy.array = _array_without_strict_copy
    import adelie as ad

    rows, d = y.shape
    state = ad.grpnet(
        X=numpy.asfortranarray(x),
        glm=ad.glm.multigaussian(y=numpy.asfortranarray(y), dtype=numpy.float64),
        groups=None,
        lmda_path=[penalty / (rows * d)],
        penalty=numpy.ones(x.shape[1]),
        intercept=False,
        tol=tolerance * 1e-3,
        max_iters=10_000_000,
        progress_bar=False,
        early_exit=False,
    )
    return numpy.asarray(state.betas[-1].todense()).reshape(x.shape[1], d)


_numpy_array = numpy.array


def _array_without_strict_copy(*values: Any, **options: Any) -> numpy.ndarray:
    if options.get("copy") is False:
        options["copy"] = None
    return _numpy_array(*values, **options)


def cone(backend: str) -> Solver:
    def call(x: numpy.ndarray, y: numpy.ndarray, penalty: float, tolerance: float) -> numpy.ndarray:
        import cvxpy

        unknown = cvxpy.Variable((x.shape[1], y.shape[1]))
        fit = cvxpy.sum_squares(x @ unknown - y) / 2
        programme = cvxpy.Problem(cvxpy.Minimize(fit + penalty * cvxpy.sum(cvxpy.norm(unknown, 2, axis=1))))
        if backend == "SCS":
            programme.solve(solver="SCS", eps_abs=tolerance, eps_rel=tolerance, max_iters=10_000_000)
        else:
            programme.solve(solver="CLARABEL", tol_gap_abs=tolerance, tol_gap_rel=tolerance, tol_feas=tolerance)
        return numpy.asarray(unknown.value)

    return call


SOLVERS: dict[str, Solver] = {
    "celer": celer,
    "scikit-learn": scikit_learn,
    "skglm": skglm,
    "adelie": adelie,
    "cvxpy+SCS": cone("SCS"),
    "cvxpy+Clarabel": cone("CLARABEL"),
}


class Peer:
    """A peer's process; `solve` yields (seconds, coefficients) per tolerance until the limit."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: subprocess.Popen[str] | None = None

    def solve(
        self, x: numpy.ndarray, y: numpy.ndarray, penalty: float, limit: float
    ) -> Iterator[tuple[float, numpy.ndarray]]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "job.npz"
            numpy.savez(path, x=x, y=y)
            self._start()
            assert self.process is not None
            assert self.process.stdin is not None
            print(json.dumps([str(path), penalty, limit]), file=self.process.stdin, flush=True)
            while True:
                try:
                    answer = self.lines.get(timeout=limit + 1.0)
                except queue.Empty:
                    answer = None
                if answer is None or "seconds" not in answer:
                    if answer is None:
                        self.close()
                    return
                with numpy.load(answer["file"]) as data:
                    yield answer["seconds"], data["v"]

    def _start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers", self.name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()
        ready = self.lines.get(timeout=180)
        if ready is None or "error" in ready:
            raise RuntimeError(f"{self.name} cannot be used: {ready}")

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[dict[str, Any] | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                lines.put(json.loads(line))
        lines.put(None)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def serve(name: str) -> None:
    """Answer jobs until stdin closes."""
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # peers print
    solver = SOLVERS[name]
    generator = numpy.random.default_rng(0)
    try:
        solver(generator.standard_normal((8, 5)), generator.standard_normal((8, 2)), 0.5, 1e-3)  # compile
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        return
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        path, penalty, limit = json.loads(line)
        with numpy.load(path) as data:
            x, y = data["x"], data["y"]
        begin = time.perf_counter()
        for number, tolerance in enumerate(_TOLERANCES):
            if time.perf_counter() - begin > limit:
                break
            try:  # as many calls as ours gets
                seconds, v = best_time(partial(solver, x, y, penalty, tolerance), at_most=_WORTH_REPEATING)
            except Exception:
                break
            file = f"{path}.{number}.npz"
            try:
                numpy.savez(file, v=v)
            except OSError:
                break
            print(json.dumps({"seconds": seconds, "file": file}), file=out, flush=True)
        print(json.dumps({"done": True}), file=out, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
