"""The closed list of networks that a file may name, and the user's own factories, which only the user may.

Nothing that a folder or a file names is executed: `torchvision:`, `timm:`, `compress:` and `transformers:` build a
class of the installed library from checked, plain arguments (`arguments`), with nothing fetched, started or written
meanwhile (`confined`). `package.module:factory` and `path/to/file.py:factory`
run that code, which takes the user's word; where the file lies is not written down, so the user says it again.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from compress.checkpoint.building.arguments import check_arguments, constructor_names
from compress.checkpoint.building.confined import confined
from compress.checkpoint.building.torchvision_index import build_torchvision, classifier_names
from compress.checkpoint.building.without_memory import NAMED, Bounds, without_memory
from compress.data.importing import import_object, is_file_spec
from compress.errors import UnknownArchitectureError, UnsupportedError, UntrustedCodeError
from compress.models import REFERENCE_NETS
from compress.models.plain import ACTIVATIONS, PlainChain

BUILD_FAULTS = (
    TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, NotImplementedError, AssertionError,
    ArithmeticError, ImportError, RecursionError,
)  # fmt: skip
TIMM_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")  # no hf-hub:, local-dir: or other source
TIMM_WORDS = frozenset({"global_pool", "act_layer", "norm_layer", "pool_type", "stem_type"})
TIMM_MORE = frozenset({"bn_eps", "bn_momentum", "in_chans", "num_classes", "drop_rate", "drop_path_rate", "img_size"})
MOST_PADDING = 64
NO_CLASS_OF_ITS_OWN = re.compile(r"Timm|Auto|PreTrained|Pretrained")  # wrap or fetch other networks


def is_known(spec: str) -> bool:
    """Whether a spec names a network of the closed list, and not a user's module."""
    return spec.partition(":")[0] in BUILDERS


def check_trust(spec: str, where: str) -> None:
    """Refuse a factory that a file names, before anything is imported. Raises UntrustedCodeError."""
    if is_file_spec(spec):
        raise UntrustedCodeError(
            f"{where} says that its network is made by the file {shown(spec)}, whose place only you know. If you trust "
            f"that code, give --arch PATH/{shown(spec)[1:-1]} (in Python: model=… with the network itself)."
        )
    if not is_known(spec):
        raise UntrustedCodeError(
            f"{where} says that its network is made by {shown(spec)}, which loading would import and run. If you trust "
            "that code, give --trust-code (in Python: trust_code=True, or model=… with the network itself)."
        )


def shown(spec: str) -> str:
    """A spec in quotes, short and printable."""
    return repr(spec if len(spec) <= 100 else f"{spec[:100]}…")


def build_architecture(
    spec: str,
    arguments: Mapping[str, Any],
    *,
    memory: bool = True,
    seed: int = 0,
    trusted: bool = False,
    bounds: Bounds = NAMED,
) -> nn.Module:
    """The module of a spec with random weights of a seed; nothing is downloaded. The global random state stays.

    Args:
        memory: without it the parameters are on the meta device: names and shapes only.
        trusted: the user's word for `package.module:factory`, whose code runs then.
        bounds: how large it may become while it is built without memory.

    Raises:
        UnknownArchitectureError: the name does not exist.
        UntrustedCodeError: it is not of the closed list, and the user did not name or trust it.
        UnsupportedError: it cannot be built with these arguments.
    """
    scheme, _, name = spec.rpartition(":") if is_file_spec(spec) else spec.partition(":")
    if not name:
        raise UnknownArchitectureError(
            f"--arch {spec!r} is not understood; expected torchvision:NAME, compress:NAME, timm:NAME, "
            f"transformers:CLASS, chain:relu, package.module:factory or file.py:factory{suggestion(spec)}."
        )
    build = BUILDERS.get(scheme)
    if build is None and not trusted:
        check_trust(spec, "The file")
    place = nullcontext() if memory else without_memory(bounds, shown(spec))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            if build is None:
                with place:
                    module = build_factory(spec, dict(arguments))
            else:
                make = build(spec, name, arguments)
                with confined(shown(spec)), place:
                    module = make()
        except BUILD_FAULTS as error:
            given = ", ".join(f"{key}={value}" for key, value in arguments.items()) or "no arguments"
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise UnsupportedError(f"{spec!r} cannot be built with {given[:300]}: {reason}.") from error
    if not isinstance(module, nn.Module):
        raise UnsupportedError(f"{spec!r} gives {type(module).__name__}; an nn.Module was expected.")
    return module


def prepare_torchvision(spec: str, name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A torchvision classifier."""
    from torchvision import models

    if name not in classifier_names():
        raise UnknownArchitectureError(
            f"torchvision has no classifier {name!r}{close_names(name, classifier_names())}."
        )
    check_arguments(spec, arguments, constructor_names(models.get_model_builder(name).__module__))
    return lambda: build_torchvision(name, dict(arguments))


def prepare_reference(spec: str, name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """One of the project's reference nets."""
    if name not in REFERENCE_NETS:
        raise UnknownArchitectureError(f"compress.models has no {name!r}; it has {', '.join(REFERENCE_NETS)}.")
    build = REFERENCE_NETS[name].build
    check_arguments(spec, arguments, frozenset(inspect.signature(build).parameters))
    return lambda: build(**arguments)


def prepare_timm(spec: str, name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A timm model, without its weights."""
    try:
        import timm
    except ImportError:
        raise UnknownArchitectureError(
            f"timm:{name} needs the timm package: pip install 'compress-networks[timm]'."
        ) from None
    if not TIMM_NAME.fullmatch(name) or not timm.is_model(name):
        raise UnknownArchitectureError(f"timm has no model {name!r:.100}{close_names(name, timm.list_models())}.")
    known = constructor_names(timm.model_entrypoint(name).__module__) | TIMM_MORE
    check_arguments(spec, arguments, known, TIMM_WORDS)
    return lambda: timm.create_model(name, pretrained=False, **arguments)


def prepare_transformers(spec: str, name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A model class of the transformers library, built from its own configuration class made of the arguments."""
    try:
        import transformers
    except ImportError:
        raise UnknownArchitectureError(f"{spec} needs the transformers package: pip install transformers.") from None
    kind: Any = getattr(transformers, name, None) if name.isidentifier() and name in dir(transformers) else None
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not is_model or NO_CLASS_OF_ITS_OWN.search(name) or not kind.__module__.startswith("transformers.models."):
        classes = [member for member in dir(transformers) if member[:1].isupper()]
        raise UnknownArchitectureError(f"transformers has no model class {name!r:.100}{close_names(name, classes)}.")
    configuration: Any = kind.config_class
    if not (isinstance(configuration, type) and issubclass(configuration, transformers.PretrainedConfig)):
        raise UnsupportedError(f"{spec!r} says of no configuration; it cannot be built from arguments.")
    check_arguments(spec, arguments, None, None)
    methods = [argument for argument in arguments if callable(getattr(configuration, argument, None))]
    if methods:  # a configuration takes any name and keeps it as an attribute
        raise UnsupportedError(f"{spec!r} cannot be built with {methods[0]}: that is a method of its configuration.")
    return lambda: kind(configuration(**arguments))


def prepare_chain(spec: str, name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A plain chain of convolutions and linear layers, an activation of that name between them."""
    if name not in ACTIVATIONS:
        raise UnknownArchitectureError(f"chain:{name[:40]}: the activation is one of {', '.join(ACTIVATIONS)}.")
    unknown = set(arguments) - {"layers", "pool", "padding"}
    if unknown or "layers" not in arguments:
        raise UnsupportedError(f"{spec!r} takes layers (read off a file), pool and padding.")
    padding = arguments.get("padding")
    if padding is not None and not (type(padding) is int and 0 <= padding <= MOST_PADDING):
        raise UnsupportedError(f"{spec!r}: padding is a number of pixels, got {padding!r:.40}.")
    return lambda: PlainChain(activation=name, **arguments)


def build_factory(spec: str, arguments: dict[str, Any]) -> nn.Module:
    """What a user's class or function returns. Its module is executed.

    A class that takes one configuration and says of which type (`config_class`, the convention of the transformers
    library) gets a configuration made of the arguments.
    """
    factory = import_object(spec, UnknownArchitectureError)
    if isinstance(factory, nn.Module):
        raise UnsupportedError(f"{spec!r} is a module that was built already; name its class or a function.")
    if not callable(factory):
        raise UnsupportedError(f"{spec!r} is not a class or a function.")
    configuration = getattr(factory, "config_class", None)
    if isinstance(factory, type) and isinstance(configuration, type) and "config" not in arguments:
        return factory(configuration(**arguments))  # type: ignore[no-any-return]
    module: nn.Module = factory(**arguments)
    return module


BUILDERS: dict[str, Callable[[str, str, Mapping[str, Any]], Callable[[], nn.Module]]] = {
    "torchvision": prepare_torchvision,
    "compress": prepare_reference,
    "timm": prepare_timm,
    "transformers": prepare_transformers,
    "chain": prepare_chain,
}


def suggestion(spec: str) -> str:
    """`torchvision:` in front of a bare name, if there is such a model."""
    if spec in REFERENCE_NETS:
        return f": did you mean compress:{spec}?"
    return f": did you mean torchvision:{spec}?" if spec in classifier_names() else ""


def close_names(name: str, names: list[str]) -> str:
    """The nearest existing names, in words."""
    from difflib import get_close_matches

    near = get_close_matches(name[:100], names, 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
