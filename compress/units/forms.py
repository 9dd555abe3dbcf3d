"""The form in which a network is written: what changes the time that it takes, and none of its outputs.

Batch norms folded into the layers in front of them, activations that write over what they read, convolutions whose
channels lie together. Each was tried on a copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from compress.checkpoint.execution import Execution, convolution_weights, is_channels_last
from compress.graph.cost import batch_of
from compress.graph.meaning import batch_norms, linear_maps
from compress.graph.ops import operation_name
from compress.graph.trace import module_path
from compress.units.folding import Foldable, folded
from compress.units.low_rank import has_hooks, largest_sound, stands_once
from compress.units.network import Network
from compress.units.surgery import TOLERANCES, Narrowed, module_outputs, narrow, relative_deviation
from compress.units.trial import RUN_FAULTS

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Threshold,
)  # fmt: skip
FRESH = ("add", "sub", "mul", "div", "cat", "layer_norm", "group_norm", "instance_norm", "native_layer_norm")


@dataclass(frozen=True)
class Form:
    """The form in which a network is written.

    Attributes:
        folds: batch norms that the layers in front of them take in.
        execution: what is set in its modules.
    """

    folds: tuple[Foldable, ...] = ()
    execution: Execution = field(default_factory=Execution)

    @property
    def channels_last(self) -> bool:
        """Whether convolutions have their channels last."""
        return self.execution.channels_last

    def __bool__(self) -> bool:
        return self != Form()

    def and_then(self, later: Form) -> Form:
        """Both changes."""
        return Form((*self.folds, *later.folds), self.execution.and_then(later.execution, {}))

    def describe(self) -> str:
        """What is otherwise than in the network as it was given, in words."""
        norms, activations = len(self.folds), len(self.execution.in_place)
        parts = [
            f"{norms} batch norm{'s' if norms > 1 else ''} folded into the layers in front" if norms else "",
            f"{activations} activation{'s' if activations > 1 else ''} in place" if activations else "",
            "convolutions laid out channels last" if self.channels_last else "",
        ]
        return ", ".join(filter(None, parts))

    def of(self, narrowed: Narrowed) -> Narrowed:
        """The network in this form. Its module is changed in place."""
        without = folded(narrowed, self.folds)
        execution = Execution().and_then(self.execution, without.removed)
        return replace(without, module=execution.applied(without.module), execution=execution)


def find_in_place(network: Network) -> tuple[str, ...]:
    """Paths of the activations that may write over what they read.

    Torch's own, called once, of which nothing else reads the value that a layer, a norm or a sum in front has made.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in network.graph.graph.nodes:
        if node.op == "call_function":
            calls.setdefault(module_path(node), []).append(node)
    made = {each.node.name for each in linear_maps(network.graph)} | {each.node for each in batch_norms(network.graph)}
    drafts: list[str] = []
    for path, part in network.module.named_modules():
        nodes = calls.get(path, [])
        if type(part) not in ACTIVATIONS or part.inplace is not False or has_hooks(part) or len(nodes) != 1:
            continue
        read = nodes[0].all_input_nodes
        alone = stands_once(network.module, part) and len(read) == 1 and len(read[0].users) == 1
        if alone and (read[0].name in made or operation_name(read[0]) in FRESH):
            drafts.append(path)
    return largest_sound(drafts, lambda each: goes_well(network, Form(execution=Execution(in_place=tuple(each)))))


def can_be_channels_last(network: Network) -> bool:
    """Whether its convolutions can have their channels last: it runs, gives the same, and lays its outputs out alike.

    What looks at a tensor's places in memory (`view` of feature maps) may not run on them.
    """
    if next(convolution_weights(network.module), None) is None or is_channels_last(network.module):
        return False
    return goes_well(network, Form(execution=Execution(channels_last=True)))


def goes_well(network: Network, form: Form) -> bool:
    """Whether a copy in this form gives what the network gives, on the examples and on one sample."""
    copy = form.of(narrow(network.module, {}, ())).module
    batches = [network.examples]
    if network.batch_size is None and len(network.examples[0]) > 1:
        batches.append(batch_of(network.examples, 1))
    return all(gives_the_same(network, copy, batch) for batch in batches)


def gives_the_same(network: Network, copy: nn.Module, batch: tuple[Tensor, ...]) -> bool:
    """Whether a copy runs on a batch, and gives the network's outputs, laid out as these are."""
    try:
        got, wanted = (module_outputs(each, batch) for each in (copy, network.module))
    except (*RUN_FAULTS, AttributeError, KeyError):
        return False
    laid_out = ([isinstance(each, Tensor) and each.is_contiguous() for each in outputs] for outputs in (wanted, got))
    if next(laid_out) != next(laid_out):
        return False
    return relative_deviation(wanted, got) <= TOLERANCES.get(network.examples[0].dtype, max(TOLERANCES.values()))
