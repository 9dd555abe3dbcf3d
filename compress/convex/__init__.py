"""The convex engine: the row-sparse multitask lasso on second moments, certified, and the selection of units.

Tensors in, tensors out; no network in sight. `from compress.convex import Moments, select_units, refit`.
"""

from compress.convex.elimination import backward_order, nested_errors
from compress.convex.lasso import MultitaskLasso
from compress.convex.moments import MomentAccumulator, Moments, stack_consumers
from compress.convex.refit import Refit, refit, relative_error
from compress.convex.selection import SelectionCurve, select_units
from compress.convex.solve import SOLVERS, solve
from compress.convex.solvers.solution import Solution

__all__ = [
    "SOLVERS",
    "MomentAccumulator",
    "Moments",
    "MultitaskLasso",
    "Refit",
    "SelectionCurve",
    "Solution",
    "backward_order",
    "nested_errors",
    "refit",
    "relative_error",
    "select_units",
    "solve",
    "stack_consumers",
]
