"""The public face: a function a command, nothing of the insides, all of it found by completion and by type checkers."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import compress
from compress.cli.catalogue import COMMANDS

BESIDES = {
    "CompressError",
    "FinetuneResult",
    "PruneResult",
    "Recipe",
    "TrainingOptions",
    "load",
    "make_recipe",
    "plan_zoo",
    "prune",  # of what a program holds; `run` is the same of files
    "read_recipe",
}


def test_every_command_is_a_function_and_every_function_a_command() -> None:
    assert {command.function for command in COMMANDS.values()} | BESIDES == set(compress.__all__)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_calls_the_function_of_its_name(name: str) -> None:
    source = inspect.getsource(import_module(f"compress.cli.commands.{name}"))
    called = {
        node.func.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and hasattr(node.func, "id")
    }
    assert called & set(compress.__all__) >= {COMMANDS[name].function}


@pytest.mark.parametrize("name", compress.__all__)
def test_a_public_name_is_there_with_a_docstring_and_is_completed(name: str) -> None:
    assert inspect.getdoc(getattr(compress, name))
    assert name in dir(compress)


def test_type_checkers_see_the_names_that_are_imported_late() -> None:
    tree = ast.parse(Path(compress.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == compress._MODULES
    assert set(seen) | {"CompressError"} == set(compress.__all__)


def test_no_other_name_is_public() -> None:
    with pytest.raises(AttributeError, match="first_tensor"):
        compress.first_tensor  # noqa: B018


@pytest.mark.parametrize("words", ["import compress", "from compress.cli import main; main(['--help'])"])
def test_neither_the_import_nor_the_help_waits_for_torch(words: str) -> None:
    code = f"{words}\nimport sys; sys.exit(int('torch' in sys.modules or 'cvxpy' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
