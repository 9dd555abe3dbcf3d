"""The command line follows the recipe: one definition an option, shown, typed, read and refused."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.cli import main
from compress.cli.app import load_command, resume_as_flag
from compress.cli.catalogue import COMMANDS
from compress.cli.takes import choose, takes
from compress.errors import RecipeError
from compress.recipe import Recipe, TrainingOptions, make_recipe
from compress.recipe.option import options_of

FAMILY = ("run", "inspect", "evaluate", "verify", "train", "finetune", "balance", "plateau")


def read(typed: list[str], *wanted: str, **settings: Any) -> Recipe:
    """The recipe of what is typed behind a command that takes these options."""
    import typer

    found: list[Recipe] = []

    def command(recipe: Recipe) -> None:
        found.append(recipe)

    app = typer.Typer(add_completion=False)
    app.command()(takes(*wanted, **settings)(command))
    app(args=typed, standalone_mode=False)
    return found[0]


def flags_of(name: str) -> set[str]:
    """The long flags of a command."""
    return {flag for parameter in load_command(name).params for flag in parameter.opts if flag.startswith("--")}


def test_every_option_of_a_recipe_is_one_of_run() -> None:
    wanted = {info.flag for name, info in options_of(Recipe).items() if name != "checkpoint"}
    assert wanted <= flags_of("run")
    assert set(Recipe.model_fields) - set(options_of(Recipe)) == {"training"}


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_every_option_of_a_training_is_one_of_train_and_finetune(command: str) -> None:
    assert {info.flag for info in options_of(TrainingOptions).values()} <= flags_of(command)
    assert set(options_of(TrainingOptions)) == set(TrainingOptions.model_fields)


@pytest.mark.parametrize("command", FAMILY)
def test_no_command_has_two_meanings_for_a_flag(command: str) -> None:
    spelled = [flag for parameter in load_command(command).params for flag in parameter.opts]
    assert len(spelled) == len(set(spelled))


def test_every_option_says_what_it_is_and_what_is_typed() -> None:
    for info in (*options_of(Recipe).values(), *options_of(TrainingOptions).values()):
        assert info.help.endswith("."), info
        assert bool(info.shown) != info.switch, info
        assert info.shown != "TEXT", info


@pytest.mark.parametrize("command", FAMILY)
def test_the_help_has_an_example_and_names_no_python_type(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"compress {command if command != 'run' else 'vgg19.pt'}" in shown
    assert not re.search(r"<\w+(\[\w+\])?>", shown)


def test_the_everyday_options_stand_before_the_expert_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    shown = capsys.readouterr().out
    places = [
        shown.index(f" {flag} ") for flag in ("--data", "--macs", "--output", "--held-back", "--solver", "--ridge")
    ]
    assert places == sorted(places)
    assert "Default: 1e-06." in shown


def test_texts_become_the_values_of_a_recipe() -> None:
    typed = ["net.pt", "--mean", ".5,.25", "--std", "1,2", "--crop", "24", "--resize", "32,40", "--arch-arg", "depth=3",
             "--arch-arg", "name=a", "--keep", "0.5", "--layer", "a", "--layer", "b", "--couple"]  # fmt: skip
    found = read(typed, "network", "data", "which layers", "how wide")
    wanted = {"checkpoint": "net.pt", "mean": (0.5, 0.25), "std": (1, 2), "crop": 24, "resize": (32, 40),
              "arch_arg": {"depth": 3, "name": "a"}, "keep": 0.5, "layer": ("a", "b"), "couple": True}  # fmt: skip
    assert found == make_recipe(wanted)


def test_what_is_typed_goes_before_the_recipe_file_also_inside_its_training(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"checkpoint": "a", "keep": 3, "seed": 7, "training": {"epochs": 4, "flip": True}}))
    found = read(["--recipe", str(path), "--keep", "5", "--epochs", "9"], "how wide", "training", argument="optional")
    assert (found.checkpoint, found.keep, found.seed) == ("a", 5, 7)
    assert found.training is not None
    assert (found.training.epochs, found.training.flip) == (9, True)


def test_faults_name_the_flag_that_was_typed_and_the_key_that_was_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"batch_size": 0, "keeep": 3}))
    with pytest.raises(RecipeError) as caught:
        read(["x.pt", "--recipe", str(path), "--macs", "a"], "how wide")
    message = str(caught.value)
    assert message.startswith("--macs: a number was expected, got 'a'; ")
    assert "batch_size: must be at least 1, got 0" in message
    assert "keeep: unknown option (did you mean 'keep'?)" in message


def test_options_that_contradict_are_named_as_flags() -> None:
    with pytest.raises(RecipeError, match="give one of --keep, --error and --penalty, got --keep, --error"):
        read(["x.pt", "--keep", "3", "--error", "0.1"], "how wide")


def test_a_wrong_choice_is_answered_with_the_nearest_right_one() -> None:
    with pytest.raises(RecipeError, match=r"--solver: one of newton, .* got 'nwton' \(did you mean 'newton'\?\)"):
        read(["x.pt", "--solver", "nwton"], "solving")


def test_a_number_of_steps_for_finetune_is_recover_now(capsys: pytest.CaptureFixture[str]) -> None:
    found = read(["x.pt", "--finetune", "300"], "after the cut")
    assert (found.recover, found.finetune) == (300, None)
    assert capsys.readouterr().err == "note: --finetune 300 is spelled --recover 300 now.\n"
    assert make_recipe({"checkpoint": "x", "finetune": 300}) == found.model_copy(update={"checkpoint": "x"})
    with pytest.raises(RecipeError, match="finetune"):
        make_recipe({"checkpoint": "x", "finetune": "hopeful"})
    with pytest.raises(RecipeError, match="recover"):
        make_recipe({"checkpoint": "x", "finetune": "sgd", "recover": 3})


def test_epochs_are_refused_where_nothing_is_trained() -> None:
    settings: dict[str, Any] = {"training_of": "finetune"}
    with pytest.raises(RecipeError, match="--epochs: only a training has that; give --finetune pathprox"):
        read(["x.pt", "--epochs", "3"], "after the cut", "training.epochs", **settings)
    found = read(["x.pt", "--epochs", "3", "--finetune", "sgd"], "after the cut", "training.epochs", **settings)
    assert found.training is not None
    assert found.training.epochs == 3


@pytest.mark.parametrize(
    ("typed", "read_as"),
    [
        (["run", "a.pt", "--resume", "out"], ["run", "a.pt", "--resume", "--output", "out"]),
        (["run", "--resume=out", "a.pt"], ["run", "--resume", "--output", "out", "a.pt"]),
        (["run", "a.pt", "--resume"], ["run", "a.pt", "--resume"]),
        (["run", "--resume", "--output", "o", "a.pt"], ["run", "--resume", "--output", "o", "a.pt"]),
        (["run", "--resume", __file__], ["run", "--resume", __file__]),
    ],
)
def test_resume_is_a_flag_and_its_old_spelling_still_works(typed: list[str], read_as: list[str]) -> None:
    assert resume_as_flag(typed) == read_as


def test_a_part_that_no_recipe_has_cannot_be_taken() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        choose(["nowhere"])


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["insepct", "net.pt"], "no command and no file 'insepct' (did you mean 'inspect'?)"),
        (["run", "x.pt", "--kep", "3"], "compress run has no option --kep (did you mean '--keep'?)"),
        (["x.pt", "--data"], "Option '--data' requires an argument. See compress"),
        (["zoo", "x.pt", "--ressume"], "did you mean '--resume'?"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest_right_one(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert answer in shown
    assert shown.count("\n") == 1
    assert ".." not in shown


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    listed = capsys.readouterr().out
    assert all(f" {name} " in listed for name in COMMANDS)
    assert main(["help", "inspect"]) == 0
    assert "compress inspect" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "offered"), [("compress ins", "inspect"), ("compress net.pt --max", "--max-drop"),
                           ("compress run --solver ne", "newton")]
)  # fmt: skip
def test_the_shell_completes_commands_options_and_choices(words: str, offered: str) -> None:
    environment = {"_COMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "compress"], capture_output=True, text=True, env=environment, check=False
    )
    assert offered in done.stdout.split()


@pytest.mark.parametrize("name", list(COMMANDS))
def test_commands_only_parse_call_and_render(name: str) -> None:
    source = inspect.getsource(import_module(f"compress.cli.commands.{name}"))
    body = source[source.index('"""', source.index("def ")) :]
    assert "locals()" not in source
    assert body.count("\n") <= 30
