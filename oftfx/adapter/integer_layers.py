"""Quantized layers as the integers that they are, whatever packs them: what is written in the form of others.

``W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]``, ``g = k // group``; codes are counted from 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.checkpoints import quantized_layers
from oftfx.errors import FoldError
from oftfx.folding.checkpoint import ROTATION
from oftfx.formats.registry import format_of
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Grid, Integers
from oftfx.model.huggingface import without_quantizer
from oftfx.model.structure import structural_copy


class Bare(NamedTuple):
    """A model of which the quantized layers are to be written anew.

    Attributes:
        model: a copy over the same weights, without a word on its quantization.
        state: its ``state_dict`` without these layers, but for their biases.
        layers: the quantized layers by path, of the model itself.
        floats: paths of the other linear layers.
    """

    model: Any
    state: dict[str, Tensor]
    layers: dict[str, nn.Module]
    floats: list[str]


def bare_of(model: nn.Module, form: str) -> Bare:
    """What is there to write.

    Raises:
        FoldError: no layer is quantized.
    """
    layers = quantized_layers(model)
    if not layers:
        raise FoldError(f"this {type(model).__name__} has no quantized layer to be saved as {form}")
    made: Any = structural_copy(model)
    inside = tuple(f"{path}." for path in layers)
    state = {
        k: v
        for k, v in made.state_dict().items()
        if not ROTATION.search(k) and (not k.startswith(inside) or k.endswith(".bias"))
    }
    without_quantizer(made)
    floats = [n for n, m in made.named_modules() if isinstance(m, nn.Linear) and n not in layers]
    return Bare(made, state, layers, floats)


class IntegerLayer(NamedTuple):
    """One layer.

    Attributes:
        codes: int16 ``(out, in)``, from 0 to ``2**bits - 1``.
        zeros: int16 ``(out, groups)``, in the same range.
        scales: ``(out, groups)``, in the dtype in which the layer multiplies.
        bits: 4 or 8.
        group: columns of a group.
        symmetric: whether every zero is in the middle, ``2**(bits - 1)``.
        weight: ``(out, in)``, float32, what the layer holds.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    bits: int
    group: int
    symmetric: bool
    weight: Tensor

    def check(self, path: str, dtype: torch.dtype, form: str) -> None:
        """Raise `FoldError` where a reader that multiplies in ``dtype`` makes another weight of it."""
        wide = [t.repeat_interleave(self.group, 1) for t in (self.zeros, self.scales.to(dtype))]
        if not torch.equal(((self.codes - wide[0]).to(dtype) * wide[1]).float(), self.weight):
            raise FoldError(
                f"{path}: {form} multiplies codes and scales in {str(dtype).removeprefix('torch.')}, and of these, "
                f"which are {str(self.scales.dtype).removeprefix('torch.')}, makes another weight; save it as it is"
                + ("" if dtype == self.scales.dtype else ", or as 'compressed-tensors', which keeps their dtype")
            )


def integers_of(path: str, layer: nn.Module, form: str) -> IntegerLayer:
    """A layer's integers.

    Raises:
        FoldError: it has none, in groups of columns, that are all of its weight.
    """
    weight_format: Any = format_of(layer)
    found = stored_integers(layer, weight_format)
    if isinstance(found, str):
        raise FoldError(
            f"{path}: {found}, which {form} does not hold to the bit. Save it as it is, or fold with "
            "quantized='float' and quantize anew"
        )
    grid, coded, zero = found
    rows = len(coded.codes)
    levels: Any = grid.levels
    low, high = int(coded.codes.min()), int(coded.codes.max())
    bits = next(b for b in (4, 8) if levels.high - levels.low < 2**b)
    middle = 2 ** (bits - 1)
    # Codes are counted so that a zero that all groups share is in the middle, where they then still fit.
    shift = middle - int(zero[0])
    symmetric = bool((zero == zero[0]).all()) and low + shift >= 0 and high + shift < 2**bits
    if not symmetric:
        shift = -int(min(levels.low, int(zero.min())))
        if int(zero.max()) + shift >= 2**bits or high + shift >= 2**bits:
            raise FoldError(
                f"{path}: its zero points are outside of {bits} bits, so they cannot be stored; save it as it is"
            )
    return IntegerLayer(
        codes=coded.codes.to(torch.int16) + shift,
        zeros=(zero + shift).to(torch.int16).view(rows, -1),
        scales=coded.scale.view(rows, -1).to(grid.product),
        bits=bits,
        group=grid.partition.tile[1],
        symmetric=symmetric,
        weight=weight_format.dequantize(layer).float(),
    )


def stored_integers(layer: nn.Module, weight_format: Any) -> tuple[Grid, Codes, Tensor] | str:
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
