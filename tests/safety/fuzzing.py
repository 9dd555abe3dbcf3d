"""Damaged checkpoints, data, recipes and zoo files, each through the command line in this process."""

from __future__ import annotations

import contextlib
import io
import random
import re
import resource
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from compress.cli import main
from compress.models import mlp

EXIT_CODES = {0, 1, 2, 3, 4, 5}
HEADROOM = 2 << 30  # address space that all cases together may add
RECIPE = """\
checkpoint: absent.pt
data: npz:absent.npz
eval: absent-test.npz
mean: [0.1, 0.2, 0.3]
std: [0.5, 0.5, 0.5]
keep: 0.5
layer: ["classifier.*", features]
min_reduction: ["2x", "macs:1.5x"]
arch_arg: {depth: 20, wide: true}
memory: 512M
seed: 3
"""
ZOO = """\
output: zoo
defaults: &shared {data: digits, keep: 0.5, selection: magnitude}
models:
  - absent-one.pt
  - {name: two, checkpoint: absent-two.pt, keep: 0.25}
  - {<<: *shared, checkpoint: "absent/*.safetensors", tolerance: 0.1}
jobs: 2
timeout: 60
job_memory: 2G
slurm: {slurm_partition: cpu}
"""
TOKENS = (
    "{", "}", "[", "]", ":", "- ", "\n", "&a ", "*a", "!!python/object/apply:os.system [echo]", "!!binary ",
    "<<: *shared", "1e999", "-1", ".nan", "null", "'", '"', "#", "\t", "\x00", "9" * 5000, "2001-99-99", "? ", "|", ">",
    "%YAML 9.9\n---", "../../x", "keep: 3", "\ud83d", "é", "true", "0x", "1:2:3", "*", "&b [*b]",
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Sound files to damage, by kind, and how the command line is called with a damaged one."""

    folder: Path
    files: dict[str, bytes]
    command: dict[str, Callable[[Path], list[str]]]
    suffix: dict[str, str]


def make_corpus(folder: Path) -> Corpus:
    """A tiny network in three forms, data in three forms, a recipe and a zoo file."""
    torch.manual_seed(0)
    state = mlp((4, 6, 3)).state_dict()
    inputs, labels = np.random.default_rng(0).normal(size=(24, 4)).astype("f4"), np.arange(24) % 3
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state}, folder / "zip")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    save_file(state, folder / "safetensors")
    np.savez(folder / "stored.npz", inputs=inputs, labels=labels)
    np.savez_compressed(folder / "packed.npz", inputs=inputs, labels=labels)
    save_arrays({"inputs": inputs, "labels": labels}, folder / "arrays")
    (folder / "recipe").write_text(RECIPE)
    (folder / "zoo").write_text(ZOO)
    artifact, good = folder / "artifact", folder / "stored.npz"
    network = ["--arch", "compress:mlp", "--arch-arg", "widths=[4,6,3]", "--input-shape", "4"]
    quick = ["--selection", "magnitude", "--keep", "0.5", "--data", f"npz:{good}"]
    if not artifact.exists():
        code, text = call([str(folder / "safetensors"), *network, *quick, "--output", str(artifact)])
        assert code == 0, text

    def checkpoint(path: Path) -> list[str]:
        return ["inspect", str(path), *network]

    def data(path: Path) -> list[str]:
        return ["evaluate", str(artifact), "--eval", str(path)]

    def recipe(path: Path) -> list[str]:
        return ["run", str(folder / "absent.pt"), "--recipe", str(path), "--output", str(folder / "out")]

    def zoo(path: Path) -> list[str]:
        return ["zoo", str(path), "--output", str(folder / "zoo-out")]

    kinds = {"zip": checkpoint, "legacy": checkpoint, "safetensors": checkpoint}
    kinds |= {"stored.npz": data, "packed.npz": data, "arrays": data, "recipe": recipe, "zoo": zoo}
    suffix = {"zip": ".pt", "legacy": ".pt", "safetensors": ".safetensors", "stored.npz": ".npz", "packed.npz": ".npz"}
    suffix |= {"arrays": ".safetensors", "recipe": ".yaml", "zoo": ".yaml"}
    return Corpus(folder, {kind: (folder / kind).read_bytes() for kind in kinds}, kinds, suffix)


def damaged(content: bytes, kind: str, draw: random.Random) -> bytes:
    """One mutation: tokens put in and lines shuffled in texts; bytes, numbers, blocks and lengths changed in others."""
    return damaged_text(content, draw) if kind in ("recipe", "zoo") else damaged_bytes(content, draw)


def damaged_text(content: bytes, draw: random.Random) -> bytes:
    """A text with tokens put in, characters lost, lines repeated."""
    text = content.decode()
    for _ in range(draw.choice([1, 1, 2, 4])):
        place = draw.randrange(len(text) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            text = text[:place] + draw.choice(TOKENS) + text[place:]
        elif kind == 1:
            text = text[:place] + text[place + draw.randrange(1, 8) :]
        elif kind == 2:
            lines = text.splitlines(keepends=True) or [""]
            lines.insert(draw.randrange(len(lines)), draw.choice(lines))
            text = "".join(lines)
        else:
            text = re.sub(r"[0-9.]+", lambda _: draw.choice(TOKENS), text, count=draw.randrange(1, 3))
    found = text.encode("utf-8", "surrogatepass")
    return found if draw.random() < 0.9 else damaged_bytes(found or b"x", draw)


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, blocks lost or doubled, numbers set to extremes."""
    found = bytearray(content)
    for _ in range(draw.choice([1, 2, 4, 16])):
        place = draw.randrange(max(1, len(found)))
        kind = draw.randrange(6)
        if kind <= 1:
            found[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            found[place : place + 8] = draw.choice([b"\xff" * 8, b"\x00" * 8, (1 << 40).to_bytes(8, "little")])
        elif kind == 3:
            del found[place : place + draw.randrange(1, 64)]
        elif kind == 4:
            found[place:place] = found[place : place + draw.randrange(1, 64)]
        else:
            found[place : place + 4] = draw.choice([b"\x00\x00\x00\x80", b"\xff\xff\xff\x7f", b"PK\x03\x04", b"c__b"])
    return bytes(found) if draw.random() < 0.9 else bytes(found[: draw.randrange(len(found) + 1)])


def call(arguments: list[str]) -> tuple[int, str]:
    """The exit code and what went to stderr of a command run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, err.getvalue()


def meet(corpus: Corpus, kind: str, content: bytes) -> tuple[int | None, str | None]:
    """The exit code with which a file is met, and what is wrong with that.

    Wrong are an exception, an unknown exit code, not exactly one line of error, memory that runs out; None: nothing.
    """
    path = corpus.folder / f"case{corpus.suffix[kind]}"
    path.write_bytes(content)
    try:
        code, text = call(corpus.command[kind](path))
    except BaseException:
        return None, traceback.format_exc(limit=-4)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if code not in EXIT_CODES:
        return code, "an unknown exit code"
    if code and len(errors) != 1 and not (kind == "zoo" and not errors):  # a zoo whose models failed says so in a table
        return code, f"{len(errors)} lines of error: {text[:300]}"
    if kind in ("recipe", "zoo") and code not in (1, 2):
        return code, "the checkpoint is absent"
    if "Traceback" in text or "not enough memory" in text:
        return code, text[-500:]
    return code, None


def bound_memory() -> None:
    """Let this process take no more than `HEADROOM` bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
