"""Tell adapters of one graph from those of another."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.store import unwrapped
from oftfx.formats.registry import format_of
from oftfx.model.names import CHILD
from oftfx.planning.program import Program

_SAMPLE = 64


def interface_of(model: nn.Module, names: Mapping[str, str]) -> int:
    """A number for a model and the way in which its sites share rotations: 31 bits.

    An ``.onnx_adapter`` file has room for one number, so this has to tell apart: other layers, other weights in the
    same layers (of each float tensor, 64 elements over its length), and adapters whose blocks mean other sites.

    Args:
        model: with or without rotations; those do not count.
        names: for each rotated site the name of its blocks; empty where there are none to swap.
    """
    model = unwrapped(model)
    layers = sorted((s.fqn, s.in_features, s.out_features) for s in Program.of(model).sites)
    number = zlib.crc32(json.dumps([type(model).__name__, layers, sorted(names.items())]).encode())
    for tensor in _floats(model):
        flat = tensor.detach().reshape(-1)
        chosen = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE]
        number = zlib.crc32(chosen.to("cpu", torch.float32).contiguous().numpy().tobytes(), number)
    return number >> 1


def _floats(model: nn.Module) -> Iterator[Tensor]:
    """Float parameters, but for those of quantized layers, which runtimes repack, and of rotations."""
    for path, module in model.named_modules():
        weight_format = format_of(module)
        if f".{CHILD}" in f".{path}" or (weight_format is not None and not weight_format.lossless):
            continue
        for parameter in module.parameters(recurse=False):
            if type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta:
                yield parameter
