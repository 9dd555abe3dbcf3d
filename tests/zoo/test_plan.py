"""What a zoo file means, and that every fault is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import RecipeError
from compress.zoo import Shard, plan_zoo
from tests.zoo.models import copies, small_plan


def test_a_glob_is_one_model_a_file_with_the_shared_options(tmp_path: Path) -> None:
    copies(tmp_path / "nets", 3)
    plan = small_plan(tmp_path, [str(tmp_path / "nets/*.safetensors")])
    assert [name for name, _ in plan.models] == ["net000", "net001", "net002"]
    assert {recipe.keep for _, recipe in plan.models} == {0.5}


def test_an_entrys_own_options_win_over_the_defaults(tmp_path: Path) -> None:
    (path,) = copies(tmp_path, 1)
    plan = small_plan(tmp_path, [path, {"name": "wider", "checkpoint": path, "keep": 0.9, "batch-size": 32}])
    assert [(name, recipe.keep, recipe.batch_size) for name, recipe in plan.models] == [
        ("net000", 0.5, 128),
        ("wider", 0.9, 32),
    ]


def test_checkpoints_and_one_recipe_are_a_zoo(tmp_path: Path) -> None:
    copies(tmp_path, 2)
    (tmp_path / "recipe.yaml").write_text("data: digits\nkeep: 0.25\n")
    plan = plan_zoo([str(tmp_path / "*.safetensors")], recipe=str(tmp_path / "recipe.yaml"), output=str(tmp_path / "o"))
    assert [(name, recipe.keep) for name, recipe in plan.models] == [("net000", 0.25), ("net001", 0.25)]
    assert plan.models[0][1].output == str(tmp_path / "o/models/net000")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        copies(tmp_path / folder, 1)
    plan = small_plan(tmp_path, [str(tmp_path / "*/net000.safetensors")])
    assert [name for name, _ in plan.models] == ["a-net000", "b-net000"]


def test_all_faults_of_a_zoo_are_in_one_line(tmp_path: Path) -> None:
    (path,) = copies(tmp_path, 1)
    with pytest.raises(RecipeError) as caught:
        small_plan(
            tmp_path,
            [
                {"checkpoint": path, "keep": -1, "tyop": 3},
                {"checkpoint": str(tmp_path / "absent.pt")},
                str(tmp_path / "*.nothing"),
                {"name": "../out", "checkpoint": path},
                {"name": "placed", "checkpoint": path, "output": "elsewhere"},
                {"keep": 0.5},
            ],
        )
    message = str(caught.value)
    for words in ("tyop: unknown option", "keep:", "no file", "no file matches", "'../out'", "output is the zoo's own"):
        assert words in message
    assert "a checkpoint was expected, got None" in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"models": []}, "models"),
        ({}, "models"),
        ({"models": ["x"], "timeout": -1, "jobs": 0, "spare": 1}, "spare: unknown field"),
        ({"models": ["x"], "job_memory": "much"}, "such as 512M"),
        ({"models": [3]}, "models"),
        ({"models": ["x"], "defaults": 3}, "defaults"),
    ],
)
def test_a_zoo_file_of_the_wrong_form_is_one_line(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=words) as caught:
        plan_zoo([str(tmp_path / "zoo.yaml")])
    assert "\n" not in str(caught.value)


def test_yaml_tags_execute_nothing(tmp_path: Path) -> None:
    (tmp_path / "zoo.yaml").write_text(f"models: !!python/object/apply:os.mkdir [{tmp_path}/made]")
    with pytest.raises(RecipeError, match="not YAML"):
        plan_zoo([str(tmp_path / "zoo.yaml")])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_are_a_partition(tmp_path: Path, count: int) -> None:
    copies(tmp_path, 5)
    plan = small_plan(tmp_path, [str(tmp_path / "*.safetensors")])
    parts = [plan.shard(Shard(index, count)).models for index in range(1, count + 1)]
    assert sorted(name for part in parts for name, _ in part) == [name for name, _ in plan.models]
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "a/b", "1/2/3", "-1/2", "1/"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="such as 2/4"):
        Shard.parse(text)
