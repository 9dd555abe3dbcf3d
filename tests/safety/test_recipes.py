"""Recipe files made to harm: no tag is followed, none takes memory or time beyond its size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compress.cli import main

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB + "keep: *i\n", "repeats its anchors"),
        (MERGED, "repeats its anchors"),
        ("keep: &a [*a]\n", "repeats its anchors"),
        ("keep: !!python/object/apply:os.system ['touch mark']\n", "not YAML"),
        ("keep: !!python/name:os.system\n", "not YAML"),
        ("x: " + "[" * 5000 + "]" * 5000, "not YAML"),
        ("keep: 1" + "0" * 5000, "not YAML"),
        ("keep: .inf\n", "keep: a whole number"),
        ("keep: 1e999\n", "keep: a whole number"),
        ("keep: .nan\n", "keep: "),
        ("#" * (1 << 21), "longer than"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("\x00", "not YAML"),
    ],
)
def test_a_harmful_recipe_is_one_line_and_usage(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    for arguments in (["absent.pt", "--recipe", "recipe.yaml"], ["zoo", "recipe.yaml"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert len(error) < 2000
        if arguments[0] != "zoo":
            assert words in error
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_anchors_and_merges_of_a_usual_size_are_read(tmp_path: Path) -> None:
    from compress.recipe import read_recipe

    (tmp_path / "r.yaml").write_text("defaults: &d {data: digits, keep: 0.5}\nmodels: [{<<: *d, seed: 1}, *d]\n")
    shared = {"data": "digits", "keep": 0.5}
    assert read_recipe(tmp_path / "r.yaml") == {"defaults": shared, "models": [{**shared, "seed": 1}, shared]}
