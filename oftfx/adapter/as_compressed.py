"""Quantized layers of any format of integers as compressed-tensors' ``pack-quantized``, to the bit or not at all.

``W = (code - zero) * scale`` in groups of columns, or rows, is what that format holds in 4 or 8 bits:
``weight_packed`` int32, codes counted from the smallest along the input; ``weight_scale (out, groups)``;
``weight_zero_point`` int32 along the output, left out where every zero is in the middle. vLLM and transformers read it.
Source: the compressors of https://github.com/vllm-project/compressed-tensors, by their behaviour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.checkpoints import ONLY, Facts, Transformers
from oftfx.adapter.integer_layers import bare_of, integers_of
from oftfx.errors import FoldError
from oftfx.folding.report import FoldReport
from oftfx.formats.packing.words import to_stream

_ZERO_POINT = ".weight_zero_point"


class Compressed(Transformers):
    """A model of transformers with its quantized layers as compressed-tensors, whatever they are here.

    Args:
        server: whether a server is to read it. transformers 5.24 takes no zero points that are packed, as vLLM does.
    """

    def __init__(self, server: bool = False) -> None:
        self.server = server

    def write(self, model: nn.Module, report: FoldReport, directory: Path) -> Facts:  # noqa: ARG002
        """Checkpoint, configuration, generation configuration."""
        if not self.takes(model):
            raise FoldError(f"a {type(model).__name__} is no model of transformers, which reads compressed-tensors")
        made, state = as_compressed(model)
        packed = next((k for k in state if k.endswith(_ZERO_POINT)), None)
        if packed is not None and not self.server:
            raise FoldError(
                f"{packed.removesuffix(_ZERO_POINT)} has zero points, which transformers does not read of "
                "compressed-tensors; vLLM does: save with server='vllm' as well, or as it is for transformers"
            )
        facts = self.write_as(made, directory, state_dict=state)
        return {**facts, ONLY: "vLLM"} if packed is not None else facts


class Scheme(NamedTuple):
    """What a config says of a layer.

    Attributes:
        bits: 4 or 8.
        group: columns of a group; -1: all.
        symmetric: whether there are no zero points.
    """

    bits: int
    group: int
    symmetric: bool

    def to_config(self, targets: list[str]) -> dict[str, Any]:
        """A group of layers in a config."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group == -1 else "group",
            "group_size": None if self.group == -1 else self.group,
            "dynamic": False,
        }
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def as_compressed(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model to save and its ``state_dict``, with every quantized layer packed; weights that it had are shared.

    Raises:
        FoldError: there is no such layer, or one whose weight the format does not hold to the bit.
    """
    bare = bare_of(model, "compressed-tensors")
    schemes: dict[Scheme, list[str]] = {}
    for path, layer in bare.layers.items():
        scheme, tensors = packed_layer(path, layer)
        schemes.setdefault(scheme, []).append(path)
        bare.state.update({f"{path}.{name}": tensor for name, tensor in tensors.items()})
    bare.model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": bare.floats,
        "config_groups": {
            # One scheme for all is said of the class: servers that join layers look for no names then.
            f"group_{i}": scheme.to_config(["Linear"] if len(schemes) == 1 else paths)
            for i, (scheme, paths) in enumerate(schemes.items())
        },
    }
    return bare.model, bare.state


def packed_layer(path: str, layer: nn.Module) -> tuple[Scheme, dict[str, Tensor]]:
    """How the config calls a layer, and its tensors.

    Raises:
        FoldError: its weight is not of integers in groups of columns, or comes out as another.
    """
    found = integers_of(path, layer, "compressed-tensors")
    rows, columns = found.codes.shape
    bits = found.bits
    words = {
        "weight_packed": to_stream(found.codes.contiguous(), bits),
        "weight_scale": found.scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not found.symmetric:
        words[_ZERO_POINT.removeprefix(".")] = to_stream(found.zeros.T.contiguous(), bits).T.contiguous()
    found.check(path, found.scales.dtype, "compressed-tensors")
    return Scheme(bits, -1 if found.group >= columns else found.group, found.symmetric), words
