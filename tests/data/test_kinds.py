"""Data as people have it: tables, texts, arrays by name, tars, saved data sets; what is wrong is one line."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import Batch, DataSource, open_data
from compress.errors import DataError

CSV = "length,width,kind,price\n1.5,2,rose,10\n2.5,3,iris,20\n0.5,1,rose,30\n"


def first(source: DataSource) -> Batch:
    return next(iter(source.batches(8)))


def refused(spec: str) -> str:
    with pytest.raises(DataError) as caught:
        first(open_data(spec))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "flowers.csv").write_text(CSV)
    return tmp_path / "flowers.csv"


def test_a_table_gives_labels_by_their_words(table: Path) -> None:
    source = open_data(f"csv:{table}?label=kind&inputs=length,width")
    batch = first(source)
    assert batch.inputs.tolist() == [[1.5, 2.0], [2.5, 3.0], [0.5, 1.0]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0, 1]
    assert source.class_names == ("iris", "rose")


def test_a_table_gives_real_targets_and_the_other_columns(table: Path) -> None:
    batch = first(open_data(f"{table}?target=price&inputs=width,length"))
    assert batch.inputs[0].tolist() == [2.0, 1.5]
    assert batch.targets is not None
    assert batch.targets.flatten().tolist() == [10, 20, 30]


def test_a_table_without_a_header_or_with_another_delimiter_is_read(tmp_path: Path) -> None:
    (tmp_path / "bare.csv").write_text("1;2\n3;4\n")
    (tmp_path / "tabs.tsv").write_text("a\tb\n1\t2\n")
    assert first(open_data(str(tmp_path / "bare.csv"))).inputs.tolist() == [[1, 2], [3, 4]]
    assert first(open_data(str(tmp_path / "tabs.tsv"))).inputs.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (CSV, "", "column 'kind', row 1"),
        (CSV, "?label=colour", "no column 'colour'"),
        (CSV, "?label=kind&target=price", "not both"),
        (CSV, "?lable=kind", "'lable' is no option"),
        (CSV, "?text=kind", "go together"),
        ("a,b\n1,2\n3\n", "", "row 2 has 1 cells"),
        ("a,a\n1,2\n", "", "two columns"),
        ("a,b\n", "", "no rows"),
        ("a,b\n1,nan\n", "", "column 'b', row 1"),
        ("a,b\n1,\n", "", "got ''"),
        ("a,b\n1,x\n2,\n", "?label=b", "row 2: the label is missing"),
        ("a,b\n1,-2\n", "?label=b", "0 or larger"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path: Path, content: str, options: str, said: str) -> None:
    (tmp_path / "wrong.csv").write_text(content)
    assert said in refused(f"{tmp_path / 'wrong.csv'}{options}")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.csv").write_bytes(bytes(range(128, 256)))
    assert "not a readable CSV file" in refused(str(tmp_path / "noise.csv"))


def test_parquet_is_read_as_a_table(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"a": [1.0, 2.0], "b": [3, 4], "kind": ["x", "y"]}
    parquet.write_table(arrow.table(columns), tmp_path / "table.parquet")
    batch = first(open_data(f"{tmp_path / 'table.parquet'}?label=kind"))
    assert batch.inputs.tolist() == [[1, 3], [2, 4]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    assert "not a readable Parquet file" in refused(str(tmp_path / "broken.parquet"))


def test_a_lone_npy_is_mapped_and_labels_may_lie_beside(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(12.0).reshape(4, 3))
    np.save(tmp_path / "y.npy", np.array([0, 1, 1, 0]))
    np.save(tmp_path / "pictures.npy", np.zeros((4, 5, 5, 3), np.uint8))
    assert not open_data(str(tmp_path / "x.npy")).has_labels
    batch = first(open_data(f"npy:{tmp_path / 'x.npy'}?labels={tmp_path / 'y.npy'}"))
    assert batch.labels is not None
    assert (batch.inputs.shape, batch.labels.tolist()) == ((4, 3), [0, 1, 1, 0])
    assert open_data(str(tmp_path / "pictures.npy")).reads_images
    assert "cannot be read" in refused(f"npy:{tmp_path / 'x.npy'}?labels={tmp_path / 'none.npy'}")
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    assert "could execute code" in refused(str(tmp_path / "objects.npy"))


def test_several_inputs_come_from_one_file_by_number_or_by_name(tmp_path: Path) -> None:
    image, features = np.zeros((5, 1, 4, 4), np.float32), np.arange(10.0).reshape(5, 2)
    np.savez(tmp_path / "numbered.npz", inputs=image, inputs_1=features, labels=np.arange(5))
    np.savez(tmp_path / "named.npz", features=features, image=image, y=np.arange(5))
    numbered = open_data(str(tmp_path / "numbered.npz"))
    named = open_data(f"{tmp_path / 'named.npz'}?inputs=image,features&labels=y")
    for source in (numbered, named):
        batch = first(source)
        assert [tuple(part.shape) for part in batch.tensors] == [(5, 1, 4, 4), (5, 2)]
        assert batch.labels is not None
        assert batch.labels.tolist() == [0, 1, 2, 3, 4]
        assert len(source.hashes) == 5
    assert named.in_order(("features", "image")).names == ("features", "image")
    assert "no array `mask`" in refused(f"{tmp_path / 'named.npz'}?inputs=image,mask")
    assert "PATH?inputs=features" in refused(str(tmp_path / "named.npz"))
    np.savez(tmp_path / "short.npz", inputs=image, inputs_1=features[:3])
    assert "N = 5" in refused(str(tmp_path / "short.npz"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Of whole words: the, cat, sat, ."""
    pytest.importorskip("tokenizers", reason="an extra of the data")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "the": 2, "cat": 3, "sat": 4, ".": 5}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "tok").mkdir()
    found.save(str(tmp_path / "tok" / "tokenizer.json"))
    return tmp_path / "tok"


def test_a_text_becomes_windows_whose_labels_are_the_next_tokens(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "story.txt").write_text("the cat sat . the cat\nsat . dog")
    batch = first(open_data(f"{tmp_path / 'story.txt'}?tokenizer={tokenizer}&length=4"))
    assert batch.inputs.tolist() == [[2, 3, 4, 5], [2, 3, 4, 5]]
    assert batch.inputs.dtype == torch.int64
    assert batch.labels is not None
    assert batch.labels.tolist() == [[3, 4, 5, 2], [3, 4, 5, 1]]
    unlabelled = open_data(f"text:{tmp_path / 'story.txt'}?tokenizer={tokenizer}&length=3&labels=none")
    assert (unlabelled.sample_count, unlabelled.has_labels) == (3, False)


def test_a_column_of_texts_becomes_tokens_and_a_mask(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,stars\nthe cat,1\nthe cat sat . the,0\n")
    source = open_data(f"{tmp_path / 'reviews.csv'}?text=text&tokenizer={tokenizer}&length=4&label=stars")
    batch = first(source)
    assert source.names == ("input_ids", "attention_mask")
    assert [part.tolist() for part in batch.tensors] == [[[2, 3, 0, 0], [2, 3, 4, 5]], [[1, 1, 0, 0], [1, 1, 1, 1]]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "needs its network's tokenizer"),
        ("?tokenizer=nowhere", "holds no tokenizer.json"),
        ("?tokenizer=TOK&length=1000", "not one window of 1000"),
        ("?tokenizer=TOK&length=1", "number of tokens"),
        ("?tokenizer=TOK&labels=all", "next or none"),
        ("?tokenizer=BROKEN", "no readable tokenizer"),
    ],
)
def test_what_is_wrong_of_a_text_is_named(tmp_path: Path, tokenizer: Path, options: str, said: str) -> None:
    (tmp_path / "story.txt").write_text("the cat sat .")
    (tmp_path / "broken.json").write_text("{}")
    options = options.replace("TOK", str(tokenizer)).replace("BROKEN", str(tmp_path / "broken.json"))
    assert said in refused(f"{tmp_path / 'story.txt'}{options}")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 6, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_of_pictures_are_read_in_place_and_never_unpacked(tmp_path: Path) -> None:
    for shard in (0, 1):
        members = {f"../../{shard}{n}.png": picture(40 * n) for n in range(3)}
        members |= {f"../../{shard}{n}.cls": str(n + shard).encode() for n in range(3)}
        write_tar(tmp_path / f"part-{shard}.tar", members)
    source = open_data(f"tar:{tmp_path}/part-*.tar")
    batch = first(source)
    assert batch.inputs.shape == (6, 3, 6, 6)
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1, 2, 1, 2, 3]
    assert len(source.hashes) == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["part-0.tar", "part-1.tar"]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a.txt": b"x"}, "no pictures"),
        ({"a.png": b"x", "a.cls": b"one"}, "no class number"),
        ({"a.png": b"x", "a.cls": b"-1"}, "from 0"),
        ({"a.png": b"x", "b.png": b"x", "b.cls": b"1"}, "a.png has no .cls"),
        ({"a.png": b"no picture"}, "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_shard_is_named(tmp_path: Path, members: dict[str, bytes], said: str) -> None:
    write_tar(tmp_path / "shard.tar", members)
    assert said in refused(str(tmp_path / "shard.tar"))


def test_a_compressed_or_missing_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    assert "uncompressed" in refused(f"tar:{tmp_path}/shard.tar")
    assert "no file" in refused(f"tar:{tmp_path}/none-*.tar")


def saved(path: Path, columns: dict[str, Any], features: Any = None) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(path))
    return path


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_a_saved_data_set_gives_pictures_or_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    pictures = [Image.fromarray(np.full((4, 4, 3), shade, np.uint8)) for shade in (0, 200)]
    folder = saved(tmp_path / "pictures", {"img": pictures, "label": [1, 0]}, features)
    source = open_data(f"hf:{folder}")
    batch = first(source)
    assert batch.inputs.shape == (2, 3, 4, 4)
    assert batch.labels is not None
    assert (batch.labels.tolist(), source.class_names) == ([1, 0], ("no", "yes"))
    numbers = saved(tmp_path / "numbers", {"a": [1.0, 2.0], "b": [3.0, 4.0], "label": [0, 1]})
    assert first(open_data(str(numbers))).inputs.tolist() == [[1, 3], [2, 4]]


@pytest.mark.filterwarnings("ignore")
def test_a_saved_data_set_that_names_files_outside_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", {"a": [1.0, 2.0]})
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": "../other.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    assert "no file in it" in refused(f"hf:{folder}")


def test_a_missing_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    (tmp_path / "story.txt").write_text("the cat")
    (tmp_path / "set").mkdir()
    for package in ("pyarrow", "pyarrow.parquet", "datasets", "tokenizers"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    for spec in (f"{tmp_path}/table.parquet", f"{tmp_path}/story.txt?tokenizer=x", f"hf:{tmp_path}/set"):
        assert "compress-networks[data]" in refused(spec)
