"""Training by the theory: PathProx, ℓ1 with a chosen sparsity, lasso and group lasso, and a compact loop."""

from compress.training.proximal.couplings import Coupling, Couplings, find_couplings, weight_decay_objective
from compress.training.proximal.pathprox import PathProx
from compress.training.proximal.penalties import ProximalL1, group_lasso_term, lasso_term

__all__ = [
    "Coupling",
    "Couplings",
    "PathProx",
    "ProximalL1",
    "find_couplings",
    "group_lasso_term",
    "lasso_term",
    "weight_decay_objective",
]
