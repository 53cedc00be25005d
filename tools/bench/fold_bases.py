"""What adapters are trained on and folded into: float models quantized by the formats' own rules."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch.nn as nn

from oftfx.formats.registry import format_of
from oftfx.formats.scalar import ScalarFormat
from oftfx.model.structure import replace_module

CALIBRATED = "GPTQ 4-bit, calibrated"
INT8 = "bnb int8"
FORMATS = ("NF4", "HQQ 4-bit", "GPTQ 4-bit", "AWQ 4-bit", CALIBRATED)
"""Groups of 64 in all. The last is rounded by gptqmodel for the layers' inputs, as real GPTQ models are."""


def quantizer(name: str) -> Callable[[nn.Module], nn.Module]:
    """What makes a layer of that base from a float one."""
    from oftfx.formats.awq import make_awq
    from oftfx.formats.bnb4 import make_linear4bit
    from oftfx.formats.bnb8 import make_linear8bit
    from oftfx.formats.gptq import make_gptq
    from oftfx.formats.hqq import make_hqq

    makers: dict[str, Callable[[Any], nn.Module]] = {
        "NF4": make_linear4bit,
        "HQQ 4-bit": lambda linear: make_hqq(linear, nbits=4, group_size=64),
        "GPTQ 4-bit": lambda linear: make_gptq(linear, bits=4, group_size=64),
        "AWQ 4-bit": lambda linear: make_awq(linear, bits=4, group_size=64),
        INT8: make_linear8bit,
    }
    return makers[name]


def quantized(base: nn.Module, name: str, chosen: Callable[[str, nn.Module], bool]) -> nn.Module:
    """A copy of a float model with the chosen layers of a base's kind, each rounded to the nearest."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    model, make = copy.deepcopy(base), quantizer(name)
    for fqn, module in list(model.named_modules()):
        if chosen(fqn, module):
            replace_module(model, module, make(module).train(module.training))
    return model


def as_floats(model: nn.Module) -> nn.Module:
    """A quantized model as float32 layers of the same values: the same function, in which training is faster."""
    same = copy.deepcopy(model)
    for _, module in list(same.named_modules()):
        held = format_of(module)
        if isinstance(held, ScalarFormat):
            replace_module(same, module, held.float_module(module, held.dequantize(module).float()))
    return same.requires_grad_(False)
