"""Names that a library gave the tensors of its networks in earlier versions, which folders on the Hub still have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def renamed_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The state under the names that a network of the transformers library has now; None where it says of none.

    The renamings are the installed library's own (from 5.0 on, which writes folders under the old names too). Tensors
    that it would also have to join or split, such as those of experts, keep their names.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return None
    if not isinstance(module, PreTrainedModel):
        return None
    given: Any = get_model_conversion_mapping(module)
    renamings = [entry for entry in given if isinstance(entry, WeightRenaming)]
    expected = module.state_dict()
    renamed = {
        rename_source_key(name, renamings, [], module.base_model_prefix, expected)[0]: tensor
        for name, tensor in state.items()
    }
    return renamed if len(renamed) == len(state) and set(renamed) != set(state) else None
