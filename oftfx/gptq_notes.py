"""Which zeros a GPTQ model holds, said so that a saved one is loaded right."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn as nn

from oftfx.formats.registry import format_named

_VERSION = "gptq_v2"


def note_zeros(model: nn.Module) -> None:
    """Let the quantization config name the version of the zeros that the layers have.

    Loaders turn the zeros of a version 1 file (``zero - 1``) into those of version 2 (``zero``), which gptqmodel's
    layers compute with, and leave the config at version 1. ``save_pretrained`` would write both, and the file would be
    loaded with every zero off by one, without a word. The config becomes an object of the model's own.

    Args:
        model: any model; one without such a config or such layers is not changed.
    """
    config: Any = getattr(model, "config", None)
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is None or not any(map(_holds_version_2, model.modules())):
        return
    quantization = copy.copy(quantization)
    if isinstance(quantization, dict):
        quantization.update(format=_VERSION, checkpoint_format=_VERSION)
    else:  # writes its format under both names
        quantization.format = _VERSION
    config.quantization_config = quantization
    if (quantizer := vars(model).get("hf_quantizer")) is not None:
        model.hf_quantizer = copy.copy(quantizer)
        model.hf_quantizer.quantization_config = quantization  # type: ignore[union-attr, assignment]


def _holds_version_2(module: nn.Module) -> bool:
    weight_format: Any = format_named("gptq")
    return weight_format.matches(module) and not weight_format.adds_one(module)
