"""Faults of one layer's moments or problem, for which that layer is left as it is and the rest goes on."""

from __future__ import annotations

import numpy
import torch

from compress.errors import CompressError, NonFiniteError, SolverError, first_line

LINEAR_ALGEBRA = (torch.linalg.LinAlgError, numpy.linalg.LinAlgError)  # type: ignore[attr-defined]
LAYER_FAULTS = (NonFiniteError, SolverError, *LINEAR_ALGEBRA)


def describe_fault(fault: Exception) -> str:
    """Why the layer is left as it is, as part of a sentence."""
    reason = first_line(fault).rstrip(".")
    return reason if isinstance(fault, CompressError) else f"a factorisation of its moments failed: {reason}"
