"""One thread per test process, so that parallel workers do not fight over cores."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` rewrites the golden files; look at the difference before it is committed."""
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files from what is found now")
