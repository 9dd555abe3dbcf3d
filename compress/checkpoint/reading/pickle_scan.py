"""What a pickle would do, found without doing it: an unpickler whose every global is an inert stand-in.

The opcodes run (they only build lists, dicts and tuples), but no name in the file is ever imported and nothing in it is
ever called: `find_class` gives a stand-in that records its name, a call of it gives another stand-in. So the names a
pickle would import, and the shapes and storages it declares, are known before any real reader sees the file.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar

import torch

from compress.errors import CheckpointError, UnsupportedError

TENSOR_BUILDERS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
REFUSED_BUILDERS = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta (without values)",
}
WRAPPERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
CALLED = (
    TENSOR_BUILDERS
    | set(REFUSED_BUILDERS)
    | WRAPPERS
    | {
        "collections.OrderedDict", "collections.Counter", "collections.defaultdict", "_codecs.encode", "builtins.set",
        "__builtin__.set", "torch.Size", "torch.device", "torch.serialization._get_layout",
        "torch._tensor._rebuild_from_type_v2",
    }
)  # fmt: skip
NAMED = {
    "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.storage.TypedStorage",
    "torch.storage.UntypedStorage", "builtins.dict", "builtins.list",
}  # fmt: skip
ITEM_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexDouble": 16, "ComplexFloat": 8, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "Untyped": 1,
}  # fmt: skip
STORAGE_NAMES = {f"torch.{name}Storage" for name in ITEM_BYTES} | {
    f"torch.storage.{name}Storage" for name in ITEM_BYTES
}
CONSTANTS = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
MAX_DEPTH = 64
PICKLE_FAULTS = (
    pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError, OverflowError,
    RecursionError, MemoryError, ImportError, AssertionError, struct.error,
)  # fmt: skip


class Stand:
    """In the place of an imported name, or of what calling it would give."""

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None) -> None:
        self.name = name
        self.called = arguments is not None
        self.arguments = arguments or ()
        self.items: list[Any] = []
        self.entries: OrderedDict[Any, Any] = OrderedDict()

    def __call__(self, *arguments: Any, **_: Any) -> Stand:
        return Stand(self.name, arguments)

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError("a stand-in is not pickled")

    def __setstate__(self, state: Any) -> None:
        self.items.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key if isinstance(key, (str, int, float, bool, bytes)) else repr(type(key))] = value

    def append(self, value: Any) -> None:
        """A list item."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """List items."""
        self.items.extend(values)

    add = append


@dataclass
class Scan:
    """What a pickle declares.

    Attributes:
        protocol: of the pickle, 0 where it names none.
        globals: names it would import, in order.
        storages: bytes each storage key declares.
        skeleton: its object, with stand-ins.
    """

    protocol: int = 0
    globals: dict[str, None] = field(default_factory=dict)
    storages: dict[str, int] = field(default_factory=dict)
    skeleton: Any = None

    @property
    def blocked(self) -> list[str]:
        """Names outside what a state dict needs."""
        return [name for name in self.globals if not is_harmless(name)]


def is_harmless(name: str) -> bool:
    """Whether torch's weights-only reader takes this global, in some version."""
    if name in CALLED or name in NAMED or name in STORAGE_NAMES:
        return True
    module, _, attribute = name.rpartition(".")
    return module == "torch" and isinstance(getattr(torch, attribute, None), CONSTANTS)


class ScanUnpickler(pickle._Unpickler):
    """Python's own unpickler in Python (its memo is a dict, so a huge memo index costs nothing), all globals inert."""

    def __init__(self, file: IO[bytes], scan: Scan) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.scan = scan

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in that remembers the name."""
        full = f"{module}.{name}"
        self.scan.globals[full] = None
        return Stand(full)

    def get_extension(self, code: int) -> None:
        """Extension codes would look a name up: refused."""
        raise pickle.UnpicklingError(f"extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        """A storage: ('storage', type, key, location, count[, view])."""
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[4], int)):
            raise pickle.UnpicklingError("a persistent id that is no storage")
        kind = pid[1].name if isinstance(pid[1], Stand) else str(pid[1])
        item = ITEM_BYTES.get(kind.rpartition(".")[2].removesuffix("Storage"), 1)
        if pid[4] < 0:
            raise pickle.UnpicklingError("a storage of negative size")
        key = str(pid[2])
        self.scan.storages[key] = max(self.scan.storages.get(key, 0), item * pid[4])
        return Stand("storage", (key, item, pid[4]))

    # a stand-in is no class, so the opcodes that make instances become plain calls
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    append: Any

    def load_newobj(self) -> None:
        """cls.__new__(cls, *args)"""
        arguments = self.stack.pop()
        self.stack.append(self._call(self.stack.pop(), arguments))

    def load_newobj_ex(self) -> None:
        """cls.__new__(cls, *args, **kwargs)"""
        self.stack.pop()
        self.load_newobj()

    def load_reduce(self) -> None:
        """f(*args)"""
        self.load_newobj()

    def load_build(self) -> None:
        """obj.__setstate__(state)"""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Stand):
            self.stack[-1].__setstate__(state)

    def _instantiate(self, klass: Any, arguments: Any) -> None:
        self.append(self._call(klass, arguments))

    @staticmethod
    def _call(function: Any, arguments: Any) -> Stand:
        if not isinstance(function, Stand):
            raise pickle.UnpicklingError("a call of something that is no imported name")
        return function(*arguments) if isinstance(arguments, (tuple, list)) else function(arguments)

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build


def scan_pickle(file: IO[bytes], name: str) -> Scan:
    """What the pickle where `file` stands declares; executes and imports nothing. Raises CheckpointError."""
    scan = Scan()
    start = file.tell()
    head = file.read(2)
    file.seek(start)
    if head[:1] == b"\x80" and len(head) == 2:
        scan.protocol = head[1]
    try:
        scan.skeleton = ScanUnpickler(file, scan).load()
    except PICKLE_FAULTS as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(f"{name!r} holds a damaged pickle: {reason}.") from None
    return scan


def walk(value: Any, path: str = "", depth: int = 0, seen: set[int] | None = None) -> Iterator[tuple[str, Stand]]:
    """Every stand-in below `value`, once, with the path of keys that leads to it."""
    seen = set() if seen is None else seen
    if depth > MAX_DEPTH or not isinstance(value, (Stand, dict, list, tuple)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Stand):
        yield path, value
        parts: list[tuple[Any, Any]] = [*value.entries.items()]
        parts += [("", item) for item in (*value.arguments, *value.items)]
    elif isinstance(value, dict):
        parts = list(value.items())
    else:
        parts = [("", item) for item in value]
    for key, item in parts:
        below = f"{path}.{key}" if path and key != "" else (str(key) if key != "" else path)
        yield from walk(item, below, depth + 1, seen)


def check_tensors(scan: Scan, name: str) -> None:
    """Refuse what would cost memory beyond the file's size before any reader builds it.

    torch enlarges a storage to fit a declared shape: that is how a small file asks for all memory.

    Raises:
        CheckpointError: a tensor that reaches beyond its storage or repeats it without end, or an unusual call.
        UnsupportedError: a sparse, nested or quantized tensor.
    """
    for path, stand in walk(scan.skeleton):
        builder, arguments = stand.name, stand.arguments
        if builder == "torch._tensor._rebuild_from_type_v2" and len(arguments) >= 3 and isinstance(arguments[0], Stand):
            builder, arguments = arguments[0].name, arguments[2]
        if builder in REFUSED_BUILDERS and stand.called:
            raise UnsupportedError(
                f"{name!r}: the tensor {path!r} is {REFUSED_BUILDERS[builder]}; save it as an ordinary dense tensor."
            )
        if stand.called and builder in TENSOR_BUILDERS:
            check_tensor(scan, name, path, arguments)
        elif stand.called and stand.name not in CALLED and stand.name != "storage" and is_harmless(stand.name):
            raise CheckpointError(f"{name!r}: {path!r} calls {stand.name}, which a state dict does not need; refused.")


def check_tensor(scan: Scan, name: str, path: str, arguments: Any) -> None:
    """Check one tensor's (storage, offset, size, stride) against the storage. Raises CheckpointError."""
    fields: list[Any] = list(arguments) if isinstance(arguments, tuple) and len(arguments) >= 4 else [None] * 4
    storage, offset = fields[:2]
    size, stride = (tuple(v.arguments[0]) if is_size(v) else v for v in fields[2:4])
    counts = isinstance(offset, int) and all(
        isinstance(v, tuple) and all(isinstance(n, int) and n >= 0 for n in v) for v in (size, stride)
    )
    if not counts or not isinstance(storage, Stand) or storage.name != "storage" or len(size) != len(stride):
        raise CheckpointError(f"{name!r} is damaged: the tensor {path!r} is not described by whole numbers.")
    held = storage.arguments[2]
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    numbers = math.prod(size)
    if offset < 0 or (numbers and last >= held):
        raise CheckpointError(
            f"{name!r} is damaged: the tensor {path!r} declares shape {size}, its storage holds {held} values."
        )
    if numbers > 1 << 24 and numbers > 64 * held:
        raise CheckpointError(
            f"{name!r}: the tensor {path!r} declares shape {size} over only {held} stored values; refused."
        )


def is_size(value: Any) -> bool:
    """Whether a stand-in is a torch.Size of a tuple."""
    return (
        isinstance(value, Stand)
        and value.name == "torch.Size"
        and len(value.arguments) == 1
        and isinstance(value.arguments[0], (tuple, list))
    )
