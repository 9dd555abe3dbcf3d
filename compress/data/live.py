"""Samples that a program holds: what a DataLoader, a list or a generator of batches gives, kept in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from compress.data.arrays import check_label_array, check_target_array
from compress.data.calls import CallShape, parameters_of
from compress.data.importing import describe_fault
from compress.data.source import DataSource
from compress.errors import CompressError, DataError

ANSWERS = ("labels", "label", "targets", "target", "y")
_BATCH = 64  # samples of a data set that are read at a time
PLAIN = (str, bytes, bool, int, float, type(None))
LISTED = (
    "Samples in a list, as detection networks take them, cannot be calibrated on: give batches of one tensor (N, …), "
    "and a module that takes them, such as the network's backbone."
)


class LiveSource(DataSource):
    """Samples in memory.

    Attributes:
        call: how the network is called with a batch.
        tensors: for each input (N, …).
        answered_last: labels or targets are what stood last in a batch, and no name said so.
    """

    def __init__(
        self,
        name: str,
        call: CallShape,
        tensors: Sequence[Tensor],
        answers: Tensor | None,
        *,
        answered_last: bool = False,
    ) -> None:
        labels, targets = None, None
        if answers is not None and answers.is_floating_point():
            targets = check_target_array(f"`{name}`", answers.numpy(), len(tensors[0]))
        elif answers is not None:
            labels = check_label_array(f"`{name}`", answers.numpy(), len(tensors[0]))
        super().__init__(name, None, labels, targets=targets)
        self.call, self.tensors, self.answered_last = call, tuple(tensors), answered_last

    @property
    def sample_count(self) -> int:
        """N."""
        return len(self.tensors[0])

    def read_inputs(self, numbers: np.ndarray) -> Tensor:
        """Rows of the first input."""
        return self.tensors[0][torch.from_numpy(numbers)]

    def read_further(self, numbers: np.ndarray) -> tuple[Tensor, ...]:
        """Rows of the other inputs."""
        places = torch.from_numpy(numbers)
        return tuple(tensor[places] for tensor in self.tensors[1:])

    def read_bytes(self, numbers: np.ndarray) -> list[bytes | memoryview]:
        """Rows of every input, one after another."""
        return [b"".join(tensor[int(number)].numpy().tobytes() for tensor in self.tensors) for number in numbers]


def collect_batches(batches: Any, module: nn.Module, *, limit: int, name: str = "data") -> LiveSource:
    """The first `limit` samples of an iterable of batches, in its order.

    A batch is what the network takes (a tensor, a tuple of tensors, a mapping of its parameters, nested as it likes),
    or a pair of that and labels or targets; in a mapping those are found by name (`labels`, `targets`, …). A torch data
    set is one of single samples, which are put into batches.

    Raises:
        DataError: nothing came, or what came cannot be what the network takes; one line that says what came.
    """
    if isinstance(batches, (Tensor, np.ndarray)):
        batches = (batches,)
    if isinstance(batches, Dataset):  # of single samples
        batches = DataLoader(batches, batch_size=_BATCH)
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes)):
        raise DataError(
            f"`{name}`: an iterable of batches was expected (a DataLoader, a list), got {kind_of(batches)}."
        )
    call: CallShape | None = None
    inputs: list[tuple[Tensor, ...]] = []
    answers: list[Tensor | None] = []
    count, number = 0, 0
    batch: Any = None
    try:
        for number, batch in enumerate(batches):
            where = f"`{name}`, batch {number}"
            args, keywords, given = split_batch(batch, module, where)
            shape, tensors = read_call(args, keywords, where)
            answer = None if given is None else read_answer(given, where)
            if call is not None and shape != call:
                raise DataError(f"`{name}`: batch {number} is built unlike batch 0; every batch must look alike.")
            call = shape
            size = check_sizes(tensors, answer, inputs[0] if inputs else None, where)
            if size:
                inputs.append(tensors)
                answers.append(answer)
            count += size
            if count >= limit:
                break
    except CompressError:
        raise
    except Exception as error:  # whatever the user's loader raises is a fault of the data
        raise DataError(f"`{name}` raised after batch {number}: {describe_fault(error)}.") from error
    if call is None or not count:
        raise DataError(f"`{name}` gave no sample; an iterable of batches was expected (is a generator used up?).")
    if any((answer is None) != (answers[0] is None) for answer in answers):
        raise DataError(f"`{name}`: some batches come with labels or targets and some without.")
    rows = tuple(torch.cat(parts)[:limit] for parts in zip(*inputs, strict=True))
    known = [answer for answer in answers if answer is not None]
    last = bool(known) and not isinstance(batch, Mapping)
    return LiveSource(name, call, rows, torch.cat(known)[:limit] if known else None, answered_last=last)


def split_batch(batch: Any, module: nn.Module, where: str) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional arguments, keywords and the answers (None without any) in one batch. Raises DataError."""
    parameters = parameters_of(module)
    names = [each.name for each in parameters]
    needed = [each for each in parameters if each.default is each.empty and each.kind is not each.KEYWORD_ONLY]
    if isinstance(batch, Mapping):
        answer = next((batch[key] for key in ANSWERS if key in batch and key not in names), None)
        if len(needed) == 1 and needed[0].name not in batch:  # the mapping itself is the argument
            left = {key: value for key, value in batch.items() if key not in ANSWERS}
            return (left,), {}, answer
        keywords = {key: value for key, value in batch.items() if key in names}
        missing = [each.name for each in needed if each.name not in keywords]
        if missing:
            raise DataError(
                f"{where}: a mapping of {', '.join(map(repr, list(batch)[:8]))} lacks {', '.join(missing)}, which "
                f"{type(module).__name__}.forward() takes."
            )
        return (), keywords, answer
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}, None
    parts = tuple(batch)
    least = max(1, len(needed))
    paired = len(parts) == 2 and isinstance(parts[0], (tuple, list)) and not isinstance(parts[1], Mapping)
    if paired and least > 1:
        return tuple(parts[0]), {}, parts[1]
    if len(parts) == least + 1:
        return parts[:-1], {}, parts[-1]
    if len(parts) == least:
        return parts, {}, None
    raise DataError(
        f"{where}: a {type(batch).__name__} of {len(parts)}; {type(module).__name__}.forward() takes {least}, and "
        "labels or targets may follow. Give pairs (inputs, labels), or mappings by parameter name."
    )


def read_call(args: Sequence[Any], keywords: Mapping[str, Any], where: str) -> tuple[CallShape, tuple[Tensor, ...]]:
    """The shape of a call and its tensors on the CPU, copied, whole numbers as int64. Raises DataError."""
    shape, tensors = CallShape.of(*map_arrays((tuple(args), dict(keywords))))
    strange = [value for _, value in shape.constants if not isinstance(value, PLAIN)]
    if strange or not tensors:
        came = ", ".join(kind_of(value) for value in strange[:3]) or "no tensor"
        raise DataError(f"{where}: tensors (or arrays) were expected as inputs, got {came}.")
    dense = []
    for tensor in tensors:
        value = tensor.detach().cpu()
        if value.is_complex() or value.is_sparse or value.is_quantized:
            raise DataError(f"{where}: a dense real tensor was expected, got {value.dtype} ({value.layout}).")
        if value.is_floating_point():
            value = value if value.dtype == torch.float64 else value.float()
        elif value.dtype != torch.bool:
            value = value.long()
        dense.append(value.clone())
    return shape, tuple(dense)


def map_arrays(value: Any) -> Any:
    """The same structure with numpy arrays as tensors."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        return {key: map_arrays(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(map_arrays, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(map_arrays, value))
    return value


def read_answer(answer: Any, where: str) -> Tensor:
    """Labels or targets as one tensor on the CPU, copied. Raises DataError."""
    value = map_arrays(answer)
    if isinstance(value, (list, tuple)) and value and all(type(element) in (int, float, bool) for element in value):
        value = torch.tensor(value)
    if not isinstance(value, Tensor):
        listed = isinstance(value, (list, tuple)) and any(isinstance(part, (Mapping, Tensor)) for part in value)
        hint = f" with an entry a sample. {LISTED}" if listed else "."
        raise DataError(f"{where}: labels or targets as one tensor were expected, got {kind_of(answer)}{hint}")
    return value.detach().cpu().clone()


def check_sizes(tensors: Sequence[Tensor], answer: Tensor | None, like: Sequence[Tensor] | None, where: str) -> int:
    """Samples in a batch. Raises DataError where its parts disagree, or its samples are unlike those before."""
    if any(not tensor.ndim for tensor in tensors):
        raise DataError(f"{where}: every input needs a batch dimension, got a single number.")
    sizes = {len(tensor) for tensor in tensors}
    if answer is not None:
        sizes.add(len(answer) if answer.ndim else 0)
    if len(sizes) > 1:
        raise DataError(f"{where}: its parts hold {', '.join(map(str, sorted(sizes)))} samples; equally many expected.")
    if like is not None:
        for tensor, first in zip(tensors, like, strict=True):
            if tensor.shape[1:] != first.shape[1:]:
                raise DataError(
                    f"{where}: samples of shape {tuple(tensor.shape[1:])}, earlier ones {tuple(first.shape[1:])}; "
                    "pad or crop them to one shape."
                )
    return sizes.pop()


def kind_of(value: Any) -> str:
    """What a thing is, for a message."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
