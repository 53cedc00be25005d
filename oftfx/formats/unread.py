"""Layers in packings for one kernel, which no format reads: what to load instead.

Their words are in an order that only that kernel knows, so they can be neither dequantized nor written.
"""

from __future__ import annotations

import torch.nn as nn

from oftfx.formats.by_name import class_named

_INSTEAD = {
    "gptqmodel.nn_modules.qlinear.": "load it with gptqmodel's backend TORCH, which keeps the words of the checkpoint "
    "(transformers: GPTQConfig(backend='torch'), AwqConfig(backend='torch_awq'))",
    "auto_gptq.nn_modules.qlinear.": "load it without ExLlama, Marlin and Triton (use_exllama=False, use_marlin=False, "
    "use_triton=False), or with gptqmodel's backend TORCH",
    "awq.modules.linear.": "load it with autoawq's version 'gemm' (AwqConfig(version='gemm'), fuse_layers=False)",
    "hqq.": "leave out hqq's prepare_for_inference, or call it after the fold",
    "torchao.": "quantize it with Int8WeightOnlyConfig, IntxWeightOnlyConfig or Float8WeightOnlyConfig, which keep "
    "one element a code",
}
"""A part of the name of the file that defines a class, and what to do."""


def load_instead(module: nn.Module) -> str | None:
    """What to load in place of a quantized layer that no format reads; None where nothing is known of it."""
    weight = module._parameters.get("weight")
    for package, instead in _INSTEAD.items():
        if class_named(module, package) is not None or type(weight).__module__.startswith(package):
            return instead
    return None
