"""One thread per test process, so that parallel workers do not fight over cores."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

from compress.artifact.folder import reload_alone as REAL_RELOAD  # noqa: E402, N812  after the number of threads


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` rewrites the golden files; look at the difference before it is committed."""
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files from what is found now")


@pytest.fixture(scope="session", autouse=True)
def quick_reload() -> Iterator[None]:
    """What a run writes is loaded in a forked process; see `tests.forked`."""
    from tests.forked import reload_forked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.artifact.folder.reload_alone", reload_forked)
        yield


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks for a reload in a process that has imported nothing, as users get it."""
    monkeypatch.setattr("compress.artifact.folder.reload_alone", REAL_RELOAD)
