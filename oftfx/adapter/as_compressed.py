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

from oftfx.adapter.checkpoints import ONLY, Facts, Transformers, quantized_layers
from oftfx.errors import FoldError
from oftfx.folding.checkpoint import ROTATION
from oftfx.folding.report import FoldReport
from oftfx.formats.base import WeightFormat
from oftfx.formats.packing.words import to_stream
from oftfx.formats.registry import format_of
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Grid, Integers
from oftfx.model.huggingface import without_quantizer
from oftfx.model.structure import structural_copy

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
    layers = quantized_layers(model)
    if not layers:
        raise FoldError(f"this {type(model).__name__} has no quantized layer to be saved as compressed-tensors")
    made: Any = structural_copy(model)
    inside = tuple(f"{path}." for path in layers)
    state = {
        k: v for k, v in made.state_dict().items() if not ROTATION.search(k) and (not k.startswith(inside) or _kept(k))
    }
    schemes: dict[Scheme, list[str]] = {}
    for path, layer in layers.items():
        scheme, tensors = packed_layer(path, layer)
        schemes.setdefault(scheme, []).append(path)
        state |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    without_quantizer(made)
    floats = [n for n, m in made.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    made.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": floats,
        "config_groups": {
            # One scheme for all is said of the class: servers that join layers look for no names then.
            f"group_{i}": scheme.to_config(["Linear"] if len(schemes) == 1 else paths)
            for i, (scheme, paths) in enumerate(schemes.items())
        },
    }
    return made, state


def packed_layer(path: str, layer: nn.Module) -> tuple[Scheme, dict[str, Tensor]]:
    """How the config calls a layer, and its tensors.

    Raises:
        FoldError: its weight is not of integers in groups of columns, or comes out as another.
    """
    weight_format: Any = format_of(layer)
    found = integers_of(layer, weight_format)
    if isinstance(found, str):
        raise FoldError(
            f"{path}: {found}, which compressed-tensors' integers do not hold to the bit. Save it as it is, or fold "
            "with quantized='float' and quantize anew"
        )
    grid, coded, zero = found
    rows, columns = coded.codes.shape
    size = grid.partition.tile[1]
    low, high = int(coded.codes.min()), int(coded.codes.max())
    bits = next(b for b in (4, 8) if grid.levels.high - grid.levels.low < 2**b)  # type: ignore[attr-defined]
    middle = 2 ** (bits - 1)
    # Codes are counted so that a zero that all groups share is in the middle, where they then still fit.
    shift = middle - int(zero[0])
    symmetric = bool((zero == zero[0]).all()) and low + shift >= 0 and high + shift < 2**bits
    if not symmetric:
        shift = -int(min(grid.levels.low, int(zero.min())))  # type: ignore[attr-defined]
        symmetric = False
        if int(zero.max()) + shift >= 2**bits or high + shift >= 2**bits:
            raise FoldError(
                f"{path}: its zero points are outside of {bits} bits, so they cannot be stored; save it as it is"
            )
    scale = coded.scale.view(rows, -1).to(grid.product)
    words = {
        "weight_packed": to_stream((coded.codes.to(torch.int16) + shift).contiguous(), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        points = (zero + shift).to(torch.int16).view(rows, -1)
        words[_ZERO_POINT.removeprefix(".")] = to_stream(points.T.contiguous(), bits).T.contiguous()
    # What a reader makes of it, in the dtype of the scales.
    level = (coded.codes.to(grid.product) - grid.partition.expand(zero).to(grid.product)) * grid.partition.expand(
        coded.scale
    ).to(grid.product)
    if not torch.equal(level.float(), weight_format.dequantize(layer).float()):
        raise FoldError(
            f"{path}: a {type(layer).__name__} multiplies its codes in another way than compressed-tensors does, so "
            "the weight would not be the same to the bit; save it as it is"
        )
    return Scheme(bits, -1 if size >= columns else size, symmetric), words


def integers_of(layer: nn.Module, weight_format: WeightFormat | None) -> tuple[Grid, Codes, Tensor] | str:
    """Grid, codes and zeros of a layer of integers; or what it is instead."""
    if not isinstance(weight_format, ScalarFormat):
        return f"a {type(layer).__name__} has no code of its own for each weight"
    grid = weight_format.grid(layer)
    if not isinstance(grid.levels, Integers):
        return f"the values of a {type(layer).__name__} are no integers"
    partition = grid.partition
    if partition.order is not None:
        return "its columns are in groups by act-order"
    if partition.kind != "tiles" or partition.tile[0] != 1 or partition.columns % partition.tile[1]:
        return f"its groups ({partition.kind} of {partition.tile}) are no equal parts of rows"
    coded = weight_format.codes(layer)
    zero = coded.zero
    if zero is None:
        if isinstance(grid.zero, str):
            return f"its zeros are {grid.zero}s"
        zero = torch.full_like(coded.scale, grid.zero)
    if not torch.equal(zero, zero.round()):
        return "its zero points are no integers"
    return grid, coded, zero


def _kept(key: str) -> bool:
    return key.endswith(".bias")
