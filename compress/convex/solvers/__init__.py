"""The solvers of the multitask lasso: Newton, batched proximal gradient, and cvxpy as the referee."""
