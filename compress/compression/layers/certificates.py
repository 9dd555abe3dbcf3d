"""A certified solution of the multitask lasso to set beside each layer's selection."""

from __future__ import annotations

from torch import Tensor

from compress.convex import Moments, MultitaskLasso, Solution, solve, solve_tolerance, solve_unit_count
from compress.report.model import Certificate

SEARCHABLE = 100_000  # K·s·D·s up to which a search over λ is affordable
LARGE_PENALTY = 0.1


def certify_layer(
    joint: Moments, costs: Tensor, width: int, error: float | None, *, solver: str, gap: float
) -> tuple[Solution, str]:
    """A certified lasso solution to set beside the selection, and which form it solves.

    The form is the one that reaches the same error, or the same width, as the selection; those are root searches over
    λ. Where one solve is already a large one (`SEARCHABLE`) it is the penalised form at a fixed part of λ_max
    instead.
    """
    if joint.gram.shape[0] * joint.output_count * joint.group_size > SEARCHABLE:
        penalty = LARGE_PENALTY * MultitaskLasso(joint, 0.0, costs).lambda_max
        solution = solve(MultitaskLasso(joint, penalty, costs), solver, tolerance=gap)
        return solution, f"penalised at {LARGE_PENALTY:g} of λ_max"
    if error is not None:
        certified = solve_tolerance(joint, max(error, 1e-6), costs, solver=solver, tolerance=gap)
        return certified, f"smallest Σc‖v‖ within a relative error of {max(error, 1e-6):.3g}"
    certified = solve_unit_count(joint, width, costs, solver=solver, tolerance=gap)
    return certified, f"penalised, λ such that {width} units are active"


def certificate_report(certificate: Solution, form: str, lambda_max: float) -> Certificate:
    """A certificate as a report holds it; `form` says which problem it solves."""
    return Certificate(
        form=form,
        penalty=certificate.penalty,
        silencing_penalty=lambda_max,
        objective=certificate.objective,
        relative_duality_gap=min(1.0, certificate.gap),  # no more than the objective itself
        active_units=len(certificate.active),
        status=certificate.message,
    )
