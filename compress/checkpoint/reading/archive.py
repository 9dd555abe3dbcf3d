"""What kind of file a checkpoint is, and whether an archive holds what it declares; nothing is unpickled."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO

from compress.checkpoint.reading.pickle_scan import Scan, scan_pickle
from compress.errors import CheckpointError, UnsupportedError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_PICKLE = 1 << 26
MAX_ENTRIES = 1 << 20
MAX_GROWTH = 8
SLACK = 1 << 20
MAGICS = {
    b"\x89HDF": "an HDF5 file (Keras?)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"BZh": "a bzip2 file; unpack it first",
    b"\xfd7zXZ": "an xz file; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x93NUMPY": "a numpy array",
    b"\x7fELF": "a program",
}
RESAVE = 'save the weights as torch.save(model.state_dict(), "weights.pt") and give that file'


def sniff_format(file: IO[bytes], name: str, size: int) -> str:
    """ "zip", "safetensors" or "legacy", from the content.

    Raises:
        UnsupportedError: a known other format.
        CheckpointError: no checkpoint at all.
    """
    file.seek(0)
    head = file.read(512)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    for magic, words in MAGICS.items():
        if head.startswith(magic):
            raise UnsupportedError(f"{name!r} is {words}, not a PyTorch checkpoint; {RESAVE}.")
    if head[257:262] == b"ustar":
        raise UnsupportedError(f"{name!r} is a tar archive; unpack it and give the checkpoint inside.")
    if len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= max(size, 8):
        return "safetensors"
    if name.endswith(".safetensors"):
        raise CheckpointError(f"{name!r} is not a valid safetensors file: its header is damaged or cut off.")
    if head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05":
        return "legacy"
    if name.endswith(".onnx"):
        raise UnsupportedError(f"{name!r} is an ONNX file; give the PyTorch checkpoint it was made from.")
    text = head.decode("utf-8", errors="replace")
    if text.isprintable() or all(c.isprintable() or c in "\r\n\t" for c in text):
        raise CheckpointError(f"{name!r} is a text file, not a checkpoint; it starts with {text.strip()[:40]!r}.")
    raise CheckpointError(f"{name!r} is not a checkpoint: its first bytes {head[:8].hex(' ')} are of no known format.")


def archive_pickle(file: IO[bytes], name: str, size: int) -> tuple[io.BytesIO, dict[str, int]]:
    """The `data.pkl` of a torch.save archive and the sizes of its storages by key.

    Raises:
        UnsupportedError: TorchScript, an exported program, or an archive of another kind.
        CheckpointError: truncated, damaged, or it would unpack to far more than its size.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            refuse_other_archives({member.filename for member in members}, name)
            check_growth(members, name, size)
            pickles = [member for member in members if member.filename.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1:
                raise CheckpointError(f"{name!r} is a zip archive without a data.pkl; torch.save did not write it.")
            if pickles[0].file_size > MAX_PICKLE:
                raise CheckpointError(f"{name!r}: its data.pkl has {pickles[0].file_size} bytes; refused.")
            content = archive.read(pickles[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, NotImplementedError, RuntimeError) as e:
        raise CheckpointError(f"{name!r} is truncated or damaged: {str(e).rstrip('.')}.") from None
    root = pickles[0].filename.removesuffix("data.pkl") + "data/"
    sizes = {m.filename.removeprefix(root): m.file_size for m in members if m.filename.startswith(root)}
    return io.BytesIO(content), sizes


def refuse_other_archives(names: set[str], name: str) -> None:
    """Say what kind of archive it is, where torch.save did not write it. Raises UnsupportedError."""
    parts = [member.split("/") for member in names]
    below = {"/".join(part[1:]) for part in parts}
    if any(part[1:2] == ["code"] for part in parts) or "constants.pkl" in below:
        raise UnsupportedError(f"{name!r} is a TorchScript archive, whose structure is compiled in; {RESAVE}.")
    marks = {"archive_format", "serialized_exported_program.json", "serialized_state_dict.pt"}
    if marks & (below | names) or any("exported_program" in member for member in names):
        raise UnsupportedError(f"{name!r} is an exported program (.pt2); {RESAVE}.")
    if names and all(member.endswith(".npy") for member in names):
        raise UnsupportedError(f"{name!r} is a numpy .npz archive, not a PyTorch checkpoint; is it data for --data?")


def check_growth(members: list[zipfile.ZipInfo], name: str, size: int) -> None:
    """Refuse zip bombs: entries that overlap, or unpack to far more than the file. Raises CheckpointError."""
    if len(members) > MAX_ENTRIES:
        raise CheckpointError(f"{name!r} has {len(members)} entries; refused.")
    packed = sum(member.compress_size for member in members)
    if packed > size:
        raise CheckpointError(f"{name!r}: its entries claim {packed} bytes of a file of {size}: they overlap; refused.")
    total = sum(member.file_size for member in members)
    if total > MAX_GROWTH * size + SLACK:
        raise CheckpointError(f"{name!r} would unpack to {total} bytes, {total // size} times its size; refused.")
    for member in members:
        if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
            raise CheckpointError(f"{name!r} is damaged: {member.filename[:60]!r} has two different sizes.")


def check_storages(scan: Scan, held: Mapping[str, int], name: str) -> None:
    """Refuse storages that are missing or shorter than the pickle declares. Raises CheckpointError."""
    for key, needed in scan.storages.items():
        if key not in held:
            raise CheckpointError(f"{name!r} is damaged: the values of storage {key[:40]!r} are missing.")
        if held[key] < needed:
            raise CheckpointError(
                f"{name!r} is damaged: storage {key[:40]!r} declares {needed} bytes and holds {held[key]}."
            )


def legacy_scan(file: IO[bytes], name: str, size: int) -> Scan:
    """What a torch.save file from before torch 1.6 declares: five pickles, then the storages.

    A plain pickle, which torch.save did not write, gives its own scan where it names something blocked.

    Raises:
        CheckpointError: truncated or damaged, or a plain pickle.
    """
    file.seek(0)
    first = scan_pickle(file, name)
    if first.skeleton != LEGACY_MAGIC:
        if first.blocked:
            return first
        raise CheckpointError(f"{name!r} is a plain pickle that torch.save did not write; {RESAVE}.")
    scans = [scan_pickle(file, name) for _ in range(4)]
    scan = scans[2]
    for other in (scans[0], scans[1], scans[3]):
        scan.globals.update(other.globals)
    needed = sum(8 + count for count in scan.storages.values())
    if file.tell() + needed > size:
        raise CheckpointError(
            f"{name!r} is truncated or damaged: its tensors need {needed} bytes, {size - file.tell()} are there."
        )
    return scan
