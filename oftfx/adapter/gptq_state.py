"""GPTQ as its published checkpoints are: zeros of version 1 where the base had them, and a config that says what is so.

gptqmodel's layers compute with the zeros of version 2, and ``save_pretrained`` writes what they have. Readers that do
not look for a version (ONNX Runtime GenAI's model builder) always take them for those of version 1, and servers take
the middle for granted where the config says ``sym``; so both are settled here, for every layer at once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch.nn as nn

from oftfx.formats.gptq import Gptq
from oftfx.model.huggingface import GPTQ_VERSION_1, zeros_of_the_base
from oftfx.model.structure import structural_copy

_ZEROS = "qzeros"


def as_published(model: nn.Module) -> nn.Module:
    """What to save in a model's place: a copy over the same weights whose zeros and config are those of a checkpoint.

    A model without such layers, or without a config that tells of them, is returned as it is.
    """
    known: Any = model
    if getattr(getattr(model, "config", None), "quantization_config", None) is None or not gptq_layers(model):
        return model
    made: Any = structural_copy(known)
    read, layers = Gptq(), gptq_layers(made)
    facts: dict[str, Any] = {
        "sym": all(read.is_symmetric(layer) for layer in layers.values()),
        "desc_act": any(read.has_order(layer) for layer in layers.values()),
    }
    if zeros_of_the_base(model) == GPTQ_VERSION_1:
        zeros = [read.version_1(layer) for layer in layers.values()]
        if all(z is not None for z in zeros):  # a zero of 0 has no place in version 1
            facts["format"] = GPTQ_VERSION_1
            for layer, words in zip(layers.values(), zeros, strict=True):
                layer._buffers["qzeros"] = words
    made.config.quantization_config = said(made.config.quantization_config, facts)
    return made  # type: ignore[no-any-return]


def gptq_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers of gptqmodel by path: those of auto-gptq keep the zeros of version 1 in memory as well."""
    read = Gptq()
    return {n: m for n, m in model.named_modules() if read.matches(m) and not read.adds_one(m)}


def said(quantization: Any, facts: dict[str, Any]) -> Any:
    """A copy of a quantization config, object or dict, with other facts."""
    made = copy.copy(quantization)
    if isinstance(made, dict):
        made.update(facts)
        if "format" in facts:
            made["checkpoint_format"] = facts["format"]
    else:  # writes its format under both names
        vars(made).update(facts)
    return made
