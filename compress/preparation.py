"""From a recipe to a traced network with its data: what a run, an inspection and an evaluation have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint.architecture import Architecture, open_architecture
from compress.checkpoint.building.builders import build_architecture, check_trust
from compress.checkpoint.execution import Execution
from compress.checkpoint.fitting import in_precision, load_weights
from compress.checkpoint.folders import WeightsFolder, load_weights_folder, read_weights_folder
from compress.checkpoint.manifest import MODEL, TOKENS, computed_state, read_artifact, with_arch
from compress.checkpoint.parametrisations import materialise
from compress.checkpoint.reading.read import Checkpoint, load_checkpoint
from compress.data import Cast, DataSource, Preprocessing, open_data, overlap
from compress.data.calls import CallShape, call_of, gather, parameters_of, spread
from compress.errors import (
    CheckpointError,
    CompressError,
    DataError,
    NonFiniteError,
    RecipeError,
    TraceError,
    first_line,
)
from compress.graph.meaning import last_operation
from compress.graph.ops import draws_randomly, place_of
from compress.graph.program import Program, output_values, run, sample_dim
from compress.graph.trace import trace_network
from compress.measures.kinds import Hints, describe_outputs, find_place, need_place, read_class_counts
from compress.measures.outputs import Output, check_finite, largest_deviation, named_outputs
from compress.progress import Progress
from compress.recipe import Recipe
from compress.units.biases import missing_biases, with_biases
from compress.units.find import find_filters, find_units
from compress.units.network import Network

TRACE_BATCH = 2
FEWEST_GUARDING = 8  # samples of a guard set
TRACE_TOLERANCE = 1e-4  # relative, of what the graph computes
FORWARD_FAULTS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Opened:
    """A network as a recipe's checkpoint gives it.

    Attributes:
        module: eval mode, computing precision.
        shapes, attributes, kept, removed, execution: as in a manifest, what it was cut to before; empty for a
            checkpoint file.
        outputs: name -> how a manifest describes an output.
        examples: small batches of every input that a manifest describes, to try where there are no data.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    module: nn.Module
    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    removed: dict[str, Any] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)
    examples: tuple[tuple[Tensor, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Guard:
    """A further domain, which is calibrated on as well.

    Attributes:
        most: points that it may lose.
        answered: name of the output that its labels or targets are answers to; empty without any.
    """

    name: str
    source: DataSource
    most: float
    answered: str = ""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network with the data it is to be compressed and evaluated on.

    Attributes:
        opened: what was loaded.
        network: it, traced; `opened.module` without the zero biases that it may have got.
        overlapping: evaluation samples that are calibration samples too.
    """

    opened: Opened
    preprocessing: Preprocessing | None
    network: Network
    calibration: DataSource | None
    evaluation: DataSource | None
    overlapping: int
    guards: tuple[Guard, ...] = ()

    @property
    def checkpoint(self) -> Checkpoint:
        """The file that was read."""
        return self.opened.checkpoint

    @property
    def architecture(self) -> Architecture:
        """Whose class it is."""
        return self.opened.architecture

    @property
    def stored(self) -> dict[str, Tensor]:
        """The checkpoint's tensors as they came."""
        return self.checkpoint.state


def prepare(recipe: Recipe, progress: Progress, *, needs_data: bool) -> Prepared:
    """Load, recognise, read data, trace and find the groups of units.

    Raises:
        CompressError: whatever is wrong with the file, the architecture, the data or the network, in one line.
    """
    device = check_device(recipe.device)
    progress.stage("loading")
    opened = open_network(recipe)
    computed = materialise(opened.module)
    if computed:
        progress.note(f"computed weights written out as numbers: {', '.join(computed)}")
    opened.module.to(device)
    preprocessing = choose_preprocessing(recipe, opened.architecture)
    sources = open_sources(recipe, preprocessing, progress, needs_data=needs_data)
    return prepare_network(recipe, opened, preprocessing, sources, progress, open_guards(recipe, preprocessing))


def open_guards(recipe: Recipe, preprocessing: Preprocessing | None) -> tuple[Guard, ...]:
    """The recipe's guard sets. Raises DataError with the name of the one that cannot be read."""
    opened = []
    for name, spec in recipe.guards:
        with blamed(f"--guard {name}"):
            source = open_data(spec, preprocessing)
            if source.sample_count < FEWEST_GUARDING:
                raise DataError(f"at least {FEWEST_GUARDING} samples are needed, got {source.sample_count}.")
        opened.append(Guard(name, source, recipe.guard_most(name)))
    return tuple(opened)


def prepare_network(
    recipe: Recipe,
    opened: Opened,
    preprocessing: Preprocessing | None,
    sources: tuple[DataSource | None, DataSource | None, int],
    progress: Progress,
    guards: Sequence[Guard] = (),
) -> Prepared:
    """Try an opened network on its data, trace it and find the groups of units.

    Args:
        sources: as `open_sources` gives them.
        guards: as `open_guards` gives them.

    Raises:
        CompressError: the network does not run on the data, cannot be traced, or gives NaN; in one line.
    """
    calibration, evaluation, common = sources
    module, device = opened.module, check_device(recipe.device)
    calibration, evaluation, *guarding = call_by_names(
        module, calibration, evaluation, *(guard.source for guard in guards)
    )
    source = calibration or evaluation
    recorded = opened.examples if source is None and recipe.input_shape is None else ()
    probes = list(recorded) or make_probes(recipe, opened.architecture, source)
    examples, returned = run_on_probe(module, [tuple(part.to(device) for part in probe) for probe in probes])
    calibration, evaluation = (
        None if source is None else Cast(source, examples[0].dtype) for source in (calibration, evaluation)
    )
    if calibration is not None and evaluation is not None:
        try_samples(module, evaluation, "--eval", examples[0], named_outputs(returned))
    guards = [
        replace(guard, source=Cast(source, examples[0].dtype))
        for guard, source in zip(guards, guarding, strict=True)
        if source is not None
    ]
    for guard in guards:
        option = f"--guard {guard.name}"
        try_samples(module, guard.source, option, examples[0], named_outputs(returned))
        shape, wanted = (
            tuple(inputs.shape[1:]) for inputs in (next(iter(guard.source.batches(1))).inputs, examples[0])
        )
        if shape != wanted:
            raise DataError(
                f"{option}: samples of shape {shape}, those of --data have {wanted}; mixing needs one shape, give "
                "--resize and --crop."
            )
    note_preprocessing(recipe, opened.architecture, preprocessing, calibration or evaluation, progress)
    progress.stage("following the forward pass")
    network = trace(module, examples, couple=recipe.couple)
    check_program(module, network, returned)
    outputs, answered = judge_outputs(
        recipe, opened, network.program, len(examples[0]), returned, (evaluation, calibration), progress
    )
    network = replace(network, outputs=outputs, answered=answered)
    if recipe.allow_bias and (biases := missing_biases(module, network.groups)):
        network = trace_with_biases(network, biases, couple=recipe.couple)
    guards = [guarded_output(guard, network.outputs) for guard in guards]
    return Prepared(opened, preprocessing, network, calibration, evaluation, common, tuple(guards))


def guarded_output(guard: Guard, outputs: Sequence[Output]) -> Guard:
    """The guard with the output that its labels or targets are answers to. Raises DataError where they fit none."""
    if guard.source.labels is None and guard.source.targets is None:
        return guard
    with blamed(f"--guard {guard.name}"):
        return replace(guard, answered=need_place(outputs, guard.source).name)


def call_by_names(module: nn.Module, *sources: DataSource | None) -> tuple[DataSource | None, ...]:
    """The sources with named inputs in the order of the call, and the module made to take them so.

    Where the names are parameters of forward(), each goes to its own; else they are taken one after another.

    Raises:
        DataError: the sources name other inputs, or forward() needs more.
    """
    named = [source for source in sources if source is not None and source.names is not None]
    if not named:
        return sources
    names, given = named[0].names or (), call_of(module)
    parameters = parameters_of(module)
    known = [parameter.name for parameter in parameters]
    if given is not None and sorted(given.names(known)) == sorted(names):
        wanted = given.names(known)  # a folder that records its call
    elif set(names) <= set(known):
        wanted = tuple(name for name in known if name in names)
        missing = [
            parameter.name
            for parameter in parameters
            if parameter.default is parameter.empty and parameter.name not in names
        ]
        if missing:
            raise DataError(
                f"{named[0].name}: the inputs are {', '.join(names)}, and {type(module).__name__}.forward() also needs "
                f"{', '.join(missing)}."
            )
        gather(module)
        keyword = any(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[: len(wanted)])
        if keyword or wanted != tuple(known[: len(wanted)]):
            spread(module, CallShape.of((), {name: torch.empty(0) for name in wanted})[0])
    else:
        wanted = names
    try:
        return tuple(
            source if source is None or source.names is None else source.in_order(wanted) for source in sources
        )
    except ValueError as error:
        raise DataError(f"{named[0].name}: {error}.") from None


def trace(module: nn.Module, examples: tuple[Tensor, ...], *, couple: bool) -> Network:
    """The graph of a module and its groups of units; nothing is known of the outputs yet. Raises TraceError."""
    graph = trace_network(module, examples)
    state = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    return Network(
        module=module,
        program=Program.of(graph),
        state={name: tensor.detach() for name, tensor in state.items()},
        groups=find_units(graph, module, couple=couple),
        examples=examples,
        filters=find_filters(graph),
    )


def trace_with_biases(network: Network, biases: tuple[str, ...], *, couple: bool) -> Network:
    """The network with zero biases of these names, traced again; it computes the same."""
    module = with_biases(network.module, biases)
    again = trace(module, network.examples, couple=couple)
    added = {name: tensor for name, tensor in again.state.items() if name in biases}
    nodes = output_values(again.program, run_on_probe(module, [network.examples])[1])
    return replace(
        again,
        state={**network.state, **added},
        outputs=tuple(replace(output, node=nodes[output.name]) for output in network.outputs),
        answered=network.answered,
        biases=biases,
    )


def open_network(recipe: Recipe) -> Opened:
    """The network of a checkpoint file, or of a folder that a run or a training wrote. Raises CompressError."""
    weights = read_weights_folder(recipe.checkpoint) if Path(recipe.checkpoint).is_dir() else None
    if weights is not None:
        return open_weights_folder(weights, recipe)
    if not Path(recipe.checkpoint).is_dir():
        checkpoint = load_checkpoint(recipe.checkpoint, state_key=recipe.state_key, trust_pickle=recipe.trust_pickle)
        checkpoint, architecture = open_architecture(checkpoint, recipe.arch, recipe.arch_arg)
        return Opened(checkpoint, architecture, build_network(checkpoint, architecture))
    artifact = with_arch(read_artifact(recipe.checkpoint), recipe.arch, recipe.arch_arg)
    trusted = recipe.trust_code or recipe.arch is not None
    module = artifact.called(artifact.build(trust_code=recipe.trust_code))
    config = artifact.config
    known, recorded = config["architecture"], (config.get("data") or {}).get("preprocessing")
    architecture = Architecture(
        spec=known["spec"],
        arguments=known["arguments"],
        input_shape=artifact.input_shape,
        preprocessing=None if recorded is None else Preprocessing.from_dict(recorded),
        how="recorded",
        trusted=trusted,
    )
    cut = (dict(config["shapes"]), dict(config["attributes"]), dict(config.get("kept") or {}))
    checkpoint = load_checkpoint(artifact.folder / MODEL)
    examples = tuple(artifact.examples(token) for token in TOKENS)
    return Opened(
        checkpoint, architecture, module, *cut, artifact.outputs, artifact.removed, artifact.execution, examples
    )


def open_weights_folder(weights: WeightsFolder, recipe: Recipe) -> Opened:
    """The network of a folder in the Hub's layout, or of one that a trainer left. Raises CompressError."""
    checkpoint = load_weights_folder(weights, trust_pickle=recipe.trust_pickle)
    if recipe.arch is not None or weights.spec is None:
        checkpoint, architecture = open_architecture(checkpoint, recipe.arch, recipe.arch_arg)
    else:
        check_trust(weights.spec, repr(str(weights.folder)))
        checkpoint, architecture = open_architecture(checkpoint, weights.spec, {**weights.arguments, **recipe.arch_arg})
        architecture = replace(
            architecture,
            input_shape=weights.input_shape or architecture.input_shape,
            preprocessing=weights.preprocessing or architecture.preprocessing,
            how="recorded",
        )
    return Opened(checkpoint, architecture, build_network(checkpoint, architecture))


def build_network(checkpoint: Checkpoint, architecture: Architecture) -> nn.Module:
    """The network with its weights, eval mode, float32 where they were stored in half precision."""
    if checkpoint.module is not None:
        module = checkpoint.module
        if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in module.state_dict().values()):
            module = module.float()
        return module.eval()
    module = build_architecture(architecture.spec, architecture.arguments, trusted=architecture.trusted)
    module = in_precision(module, checkpoint.state)
    load_weights(module, computed_state(checkpoint.state))
    return module.eval()


def check_device(name: str) -> torch.device:
    """The torch device of that name, if it is there. Raises RecipeError.

    On a CUDA device convolutions compute in whole float32 from then on, in this process: with the shorter TF32 a cut
    network could not be told from a wrong one, and moments would be good to three digits.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device: {name!r} is not a device; give cpu, cuda or cuda:0.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device: {name!r} was asked for, but torch sees no CUDA device here; give cpu.")
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device: {name!r} is not supported; give cpu or cuda.")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return device


def choose_preprocessing(recipe: Recipe, architecture: Architecture | None = None) -> Preprocessing | None:
    """The recipe's preprocessing where it says something, the recognised architecture's where it does not."""
    given = {name: value for name in ("mean", "std", "resize", "crop") if (value := getattr(recipe, name)) is not None}
    known = None if architecture is None else architecture.preprocessing
    if not given:
        return known
    return replace(known, **given) if known is not None else Preprocessing(**given)


def open_sources(
    recipe: Recipe, preprocessing: Preprocessing | None, progress: Progress, *, needs_data: bool
) -> tuple[DataSource | None, DataSource | None, int]:
    """Calibration and evaluation data and the number of evaluation samples that are calibration samples too.

    Raises:
        DataError: data is missing or unusable, or an accuracy gate would be certified on overlapping data.
    """
    if needs_data and recipe.data is None:
        raise DataError("No calibration data: give --data folder:PATH, npz:PATH, safetensors:PATH or digits.")
    with blamed("--data"):
        calibration = None if recipe.data is None else open_data(recipe.data, preprocessing)
    with blamed("--eval"):
        evaluation = None if recipe.eval is None else open_data(recipe.eval, preprocessing)
    common = 0
    if calibration is not None and evaluation is not None:
        progress.stage("comparing calibration and evaluation samples")
        common = overlap(calibration, evaluation)
        if common and recipe.max_drop is not None:
            raise DataError(
                f"{common} of {evaluation.sample_count} evaluation samples are calibration samples too; "
                "--max-drop certifies only on disjoint data. Give other --eval data."
            )
        if common:
            progress.note(
                f"warning: {common} of {evaluation.sample_count} evaluation samples are calibration samples too; "
                "the accuracies below are flattered by that."
            )
    check_answered(recipe, evaluation)
    return calibration, evaluation, common


def check_answered(recipe: Recipe, evaluation: DataSource | None) -> None:
    """Refuse evaluation data that the recipe's bound says nothing of. Raises DataError."""
    if recipe.max_drop is None or evaluation is None or recipe.own_metric or evaluation.has_labels:
        return
    if recipe.metric is None or evaluation.targets is None:
        raise DataError("--max-drop needs labels, and the evaluation data has none.")


@contextmanager
def blamed(option: str) -> Iterator[None]:
    """Faults of the data are said with the option that gave them. Raises DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{option}: {error}") from error


def try_samples(
    module: nn.Module, source: DataSource, option: str, probe: Tensor, wanted: Mapping[str, Tensor]
) -> None:
    """Run the network once on the first samples of a source, so that it does not fail at the end of the work.

    Args:
        probe: a batch (B, …) that the network does run on, whose size is taken.
        wanted: what it gives then, by output.

    Raises:
        DataError: the network does not run on them, or gives outputs of another number of dimensions.
    """
    with blamed(option):
        count = min(len(probe), source.sample_count)
        tensors = next(iter(source.batches(count, torch.arange(count)))).tensors
    places = torch.arange(len(probe)) % count
    shape = tuple(tensors[0].shape[1:])
    try:
        with torch.inference_mode():
            returned: object = module(*(tensor[places].to(probe.device) for tensor in tensors))
    except FORWARD_FAULTS as error:
        raise DataError(
            f"{option}: the network runs on the samples of shape {tuple(probe.shape[1:])}, but not on "
            f"those of shape {shape} from {source.name}: {first_line(error)}"
        ) from error
    for name, tensor in named_outputs(returned).items():
        if name in wanted and tensor.ndim != wanted[name].ndim:
            raise DataError(
                f"{option}: on samples of shape {shape} from {source.name} the network's {name!r} has {tensor.ndim} "
                f"dimensions, on the others, of shape {tuple(probe.shape[1:])}, {wanted[name].ndim}; give samples of "
                "the shape that it was trained on."
            )


def note_preprocessing(
    recipe: Recipe,
    architecture: Architecture,
    preprocessing: Preprocessing | None,
    source: DataSource | None,
    progress: Progress,
) -> None:
    """Say how images are prepared where nobody has said it: it may not be how the network was trained."""
    if source is None or not source.reads_images or recipe.mean is not None or architecture.how == "recorded":
        return
    if preprocessing is None or preprocessing.mean is None or preprocessing.std is None:
        progress.note(
            "images are scaled to [0, 1] and not normalised; give --mean and --std if the network wants that."
        )
        return
    mean, std = (",".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    progress.note(
        f"images are prepared as published for {architecture.spec}: --mean {mean} --std {std}; give yours if this "
        "network was trained with others."
    )


def make_probes(recipe: Recipe, architecture: Architecture, source: DataSource | None) -> list[tuple[Tensor, ...]]:
    """Small batches of every valid input: real samples where there are some, else seeded noise, then equal tokens.

    A network may be written for one batch size; `TRACE_BATCH` and the recipe's are tried.
    """
    wanted = recipe.input_shape or architecture.input_shape
    if source is None:
        if wanted is None:
            raise DataError("The shape of the inputs is not known: give --data, or --input-shape 3,32,32.")
        noise = torch.randn(TRACE_BATCH, *wanted, generator=torch.Generator().manual_seed(recipe.seed))
        return [(noise,), *((torch.full((TRACE_BATCH, *wanted), token),) for token in (0, 1))]
    probes = []
    for size in dict.fromkeys((TRACE_BATCH, recipe.batch_size)):
        count = min(size, source.sample_count)
        inputs = next(iter(source.batches(count, torch.arange(count)))).tensors
        probes.append(tuple(part.repeat(-(-size // count), *[1] * (part.ndim - 1))[:size] for part in inputs))
    first = probes[0][0]
    if wanted is not None and tuple(first.shape[1:]) != tuple(wanted) and not _resizable(first, wanted):
        raise DataError(
            f"The network takes samples of shape {tuple(wanted)}, the data gives {tuple(first.shape[1:])}; "
            "give --resize and --crop, or other data."
        )
    return probes


def _resizable(inputs: Tensor, wanted: Sequence[int]) -> bool:
    """Images of another size, and as many numbers in another shape, are tried: the network itself says if it minds."""
    if inputs[0].numel() == math.prod(wanted) and inputs.ndim == 2:
        return True
    return inputs.ndim == 4 and len(wanted) == 3 and inputs.shape[1] == wanted[0]


def run_on_probe(module: nn.Module, probes: Sequence[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], object]:
    """The first of the probes that the network runs on, and what it returns.

    A first input of whole numbers is tried as it is and then in the network's own precision; real numbers in that
    precision alone.

    Raises:
        CheckpointError: the network runs on none of them; the message is about the first.
        NonFiniteError: an output is NaN or Inf.
        TraceError: it returns no tensor.
    """
    precision = next((tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()), torch.float32)
    fault: CompressError | None = None
    for probe in probes:
        for dtype in (precision,) if probe[0].is_floating_point() else (probe[0].dtype, precision):
            further = (part.to(precision) if part.is_floating_point() else part for part in probe[1:])
            inputs = (probe[0].to(dtype), *further)
            try:
                with torch.inference_mode():
                    returned: object = module(*inputs)
            except FORWARD_FAULTS as error:
                shapes = ", ".join(str(tuple(part.shape)) for part in probe)
                said = f"The network does not run on inputs of shape {shapes}: {first_line(error)}"
                fault = fault or CheckpointError(said)
                continue
            try:
                check_finite(named_outputs(returned), f"{type(module).__name__} on the first samples")
            except NonFiniteError as error:  # as of a row that is nothing but padding
                fault = fault or error
                continue
            return inputs, returned
    raise fault or CheckpointError("The network was not tried on any input.")


def check_program(module: nn.Module, network: Network, returned: object) -> None:
    """Refuse a trace that does not compute what the module `returned` for the network's examples.

    Raises:
        TraceError: the trace gives something else.
    """
    program = network.program
    nodes = {name: node for name, node in output_values(program, returned).items() if node is not None}
    with torch.inference_mode():
        values = run(program, (network.state,), network.examples, list(nodes.values()))
    wanted = named_outputs(returned)
    traced = {name: values[node][0] for name, node in nodes.items()}
    deviation, where = largest_deviation({name: wanted[name] for name in traced}, traced)
    if deviation > TRACE_TOLERANCE:
        said = "" if len(wanted) == 1 else f", in its output `{where}`"
        raise TraceError(
            explain_changing(module, network)
            or f"The traced graph does not compute what {type(module).__name__} computes{said}."
        )


def explain_changing(module: nn.Module, network: Network) -> str | None:
    """Why a module gives other outputs each time; None where it does not."""
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    with torch.inference_mode(), torch.random.fork_rng():
        first, second = (named_outputs(module(*network.examples)) for _ in range(2))
    if largest_deviation(first, second)[0] <= TRACE_TOLERANCE:
        return None
    written = [name for name, tensor in module.named_buffers() if not torch.equal(tensor, before[name])]
    if written:
        return (
            f"{type(module).__name__} gives other outputs each time: forward() changes its buffer `{written[0]}`; "
            "change it only where self.training."
        )
    drawn = [node for node in network.program.nodes.values() if draws_randomly(node)]
    shown = f" ({place_of(drawn[0])})" if drawn else ""
    return (
        f"{type(module).__name__} gives other outputs each time: forward() draws random numbers in evaluation mode"
        f"{shown}; draw them only where self.training, or take them as an input."
    )


def judge_outputs(
    recipe: Recipe,
    opened: Opened,
    program: Program,
    samples: int,
    returned: object,
    sources: Sequence[DataSource | None],
    progress: Progress,
) -> tuple[tuple[Output, ...], str]:
    """The outputs that count, each with its kind, and the name of the one that labels or targets are answers to.

    Args:
        sources: evaluation data, then calibration data.

    Raises:
        DataError: labels or targets of the evaluation data, or the only labels there are, fit no output.
    """
    nodes = output_values(program, returned)
    hints = Hints(
        architecture=opened.architecture.spec,
        class_counts=read_class_counts(opened.module),
        last={name: last_operation(program, node) for name, node in nodes.items() if node is not None},
        known=opened.outputs,
        sample_dims={name: sample_dim(program, node) for name, node in nodes.items() if node is not None}
        if program.network.batch_size is None
        else None,
    )
    tensors = named_outputs(returned)
    outputs = describe_outputs(tensors, samples, sources, hints, recipe.output_weight)
    outputs = tuple(replace(output, node=nodes[output.name]) for output in outputs)
    answered = ""
    for number, source in enumerate(sources):
        if source is None or (source.labels is None and source.targets is None):
            continue
        place = need_place(outputs, source) if number == 0 else find_place(outputs, source)
        if place is None:
            try:
                need_place(outputs, source)
            except DataError as error:
                if source.labels is not None and source.labels.ndim == 1:
                    raise
                progress.note(f"warning: {error}")
            continue
        answered = answered or place.name
    for output in outputs:
        wide = output.kind == "real" and len(output.shape) == 1 and output.shape[0] > 1
        if wide and output.name != answered:
            progress.note(
                f"output `{output.name}` of {output.shape[0]} numbers is compared by squares: nothing says that they "
                "are class scores."
            )
    return outputs, answered
