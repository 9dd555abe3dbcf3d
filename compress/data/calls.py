"""How a network is called: its tensors in one flat order, and the arguments that they stand in.

Everything behind the door runs networks on a tuple of tensors. A network that takes keywords, dictionaries or nested
tuples is given a subclass of its own class whose forward() takes that tuple and puts each tensor in its place; names,
tensors and modules stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class CallShape:
    """Where the tensors of a call stand among its arguments.

    For `net({"image": x, "size": 3}, mask=m)` the tensors are (x, m), and 3 is a constant of the call.

    Attributes:
        spec: of (positional arguments, keywords).
        constants: (place, value) of the leaves that are no tensors, among all leaves.
        count: tensors.
    """

    spec: TreeSpec
    constants: tuple[tuple[int, Any], ...]
    count: int

    @classmethod
    def of(cls, args: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[CallShape, tuple[Tensor, ...]]:
        """The shape of a call and its tensors in order."""
        leaves, spec = tree_flatten((tuple(args), dict(keywords)))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        constants = tuple((place, leaf) for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        return cls(spec, constants, len(tensors)), tensors

    @property
    def is_plain(self) -> bool:
        """Whether the tensors are the positional arguments themselves."""
        args, keywords = self.arguments(range(self.count))
        return not keywords and not self.constants and args == tuple(range(self.count))

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments and keywords with these tensors in their places."""
        if len(tensors) != self.count:
            raise ValueError(f"the network takes {self.count} tensors, got {len(tensors)}.")
        left, constants = iter(tensors), dict(self.constants)
        places = self.count + len(constants)
        leaves = [constants[place] if place in constants else next(left) for place in range(places)]
        args, keywords = tree_unflatten(leaves, self.spec)
        return args, keywords


def spread(module: nn.Module, shape: CallShape) -> nn.Module:
    """The module itself, of a subclass of its class whose forward() takes the tensors one after another.

    `gather` undoes it, on the module and on every copy of it.
    """
    if shape.is_plain:
        return module
    kind = type(module)

    def forward(self: nn.Module, *tensors: Tensor) -> Any:
        args, keywords = shape.arguments(tensors)
        return kind.forward(self, *args, **keywords)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "_spread_from": kind})
    return module


def gather(module: nn.Module) -> nn.Module:
    """The module itself, of the class that it had before `spread`."""
    kind = type(module).__dict__.get("_spread_from")
    if kind is not None:
        module.__class__ = kind
    return module
