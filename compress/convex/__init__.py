"""The convex engine: the row-sparse multitask lasso on second moments, certified, and the selection of units.

Tensors in, tensors out; no network in sight. `from compress.convex import Moments, select_units, refit`.
"""

from compress.convex.exact import solve_exact
from compress.convex.lasso import MultitaskLasso
from compress.convex.low_rank import ReducedRank, reduced_rank
from compress.convex.path import penalty_grid, solve_path, solve_tolerance, solve_unit_count
from compress.convex.reductions import Reduction, reduce_problem
from compress.convex.refit import RIDGE, Refit, refit, relative_error
from compress.convex.selecting.elimination import backward_order, forward_order, nested_errors
from compress.convex.selecting.selection import METHODS, SelectionCurve, lasso_order, select_units
from compress.convex.selecting.swaps import polish_units
from compress.convex.solution import Solution, Status
from compress.convex.solve import SOLVERS, Solver, solve, solve_batch
from compress.convex.solvers.conic import Conic
from compress.convex.solvers.newton import Newton
from compress.convex.solvers.proximal import Proximal
from compress.convex.statistics.factored import FactorAccumulator, FactoredMoments
from compress.convex.statistics.moments import MomentAccumulator, Moments, contributions, stack_consumers
from compress.convex.statistics.shrinkage import shrink_moments, shrinkage_intensity
from compress.convex.width_bound import WidthBound, reduce_width, width_bound

__all__ = [
    "METHODS",
    "RIDGE",
    "SOLVERS",
    "Conic",
    "FactorAccumulator",
    "FactoredMoments",
    "MomentAccumulator",
    "Moments",
    "MultitaskLasso",
    "Newton",
    "Proximal",
    "ReducedRank",
    "Reduction",
    "Refit",
    "SelectionCurve",
    "Solution",
    "Solver",
    "Status",
    "WidthBound",
    "backward_order",
    "contributions",
    "forward_order",
    "lasso_order",
    "nested_errors",
    "penalty_grid",
    "polish_units",
    "reduce_problem",
    "reduce_width",
    "reduced_rank",
    "refit",
    "relative_error",
    "select_units",
    "shrink_moments",
    "shrinkage_intensity",
    "solve",
    "solve_batch",
    "solve_exact",
    "solve_path",
    "solve_tolerance",
    "solve_unit_count",
    "stack_consumers",
    "width_bound",
]
