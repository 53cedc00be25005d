"""Experts of gpt-oss that transformers has read from MXFP4: floats in memory, each one of the few that MXFP4 has.

The checkpoint holds a 4-bit float for every number, two in a byte, and a power of two for every 32 numbers along the
input: ``<name>_blocks`` uint8 ``(experts, out, in / 32, 16)``, ``<name>_scales`` uint8 ``(experts, out, in / 32)``.
Without its kernels the package makes ``(experts, in, out)`` floats of it. A fold that rounds puts them on such a grid
again, so that they can be written as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError
from oftfx.formats.base import WeightFormat, WeightState
from oftfx.formats.by_name import class_named
from oftfx.formats.dense import DenseParameter
from oftfx.formats.experts import Apart, ExpertsFormat
from oftfx.formats.packing.float4_codes import stored_power, to_exponents, to_nibbles
from oftfx.grids import Codes, Float4, Grid, Partition

_GROUP, _EXPONENT = 32, 2  # of the largest level, 6 = 1.5 * 2^2
PROJECTIONS = ("gate_up_proj", "down_proj")
BLOCKS, SCALES = "_blocks", "_scales"
"""Behind the name of a parameter, what a checkpoint has of it."""


class Mxfp4Experts(DenseParameter, ExpertsFormat):
    """One such parameter, rounded to MXFP4 when it is folded by a policy that rounds.

    Not registered: in memory it is a plain parameter, and only its values say where it comes from; see `born_in_mxfp4`.
    """

    name = "mxfp4"
    lossless = False

    def requantize(self, weight: Tensor, like: nn.Module) -> WeightState:
        """The nearest values of MXFP4, with scales of their own; groups that have not changed keep theirs."""
        wide = weight.float()
        grid, old = _grid(wide), codes_of(self.borrow(like))
        return self._state_of(grid.values(grid.nearest(wide, old)), like)

    def apart(self, module: nn.Module) -> Apart | None:
        """Always: groups are along the inputs of one expert."""
        matrices = self.each(self.borrow(module), module)
        coded = [codes_of(matrix.contiguous()) for matrix in matrices]
        found = [c for c in coded if c is not None]
        return Apart(_grid(matrices[0]), found) if len(found) == len(coded) else None

    def together(self, coded: Sequence[Codes], like: nn.Module) -> WeightState:
        """Their values."""
        grid, layout = _grid(coded[0].codes), self.layout(like)
        each = torch.stack([grid.values(c) for c in coded])  # (experts, out, in)
        return self._state_of(each.transpose(0, 1).flatten(1) if layout.each else each.flatten(0, 1), like)

    def _state_of(self, new: Tensor, like: nn.Module) -> WeightState:
        state = super().requantize(new, like)
        if not torch.equal(self.layout(like).matrix(state[self.parameter].detach()).float(), new):
            raise FormatError(f"values of MXFP4 do not fit in {self.dtype(like)}")
        return state

    def as_floats(self, weight: Tensor, like: nn.Module) -> WeightState:
        """The state in which it is any floats."""
        return super().requantize(weight, like)


def born_in_mxfp4(found: WeightFormat, module: nn.Module) -> Mxfp4Experts | None:
    """The format of experts whose floats all are values of MXFP4; None for other parameters.

    By the values, for nothing else is left of the codes; floats that nobody rounded are never all of them such.
    """
    if type(found) is not DenseParameter or not class_named(module, "gpt_oss", "GptOssExperts"):
        return None
    if found.parameter not in PROJECTIONS or codes_of(found.borrow(module)) is None:
        return None
    return Mxfp4Experts(found.parameter, found._layout, found._kind, found._placements)


def codes_of(weight: Tensor) -> Codes | None:
    """Codes and scales of a matrix ``(rows, in)``; None where a value is none of MXFP4's.

    Of the scales that would do, the one under which the largest of a group is 4 or 6.
    """
    if weight.shape[1] % _GROUP:
        return None
    groups = weight.float().reshape(-1, _GROUP)
    largest = groups.abs().amax(1)
    exponent = torch.where(largest > 0, torch.frexp(largest)[1] - 1 - _EXPONENT, 0)
    scale = stored_power(torch.ldexp(torch.ones_like(largest), exponent))
    codes = Float4(weight.device).encode(groups / scale.unsqueeze(1))
    same = torch.equal(Float4(weight.device).decode(codes) * scale.unsqueeze(1), groups)
    return Codes(codes.reshape(weight.shape), scale) if same else None


def packed_experts(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Blocks and scales of a parameter ``(experts, in, out)``; None where a value is none of MXFP4's."""
    experts, inner, outer = weight.shape
    coded = codes_of(weight.transpose(1, 2).reshape(-1, inner))
    if coded is None:
        return None
    blocks = to_nibbles(coded.codes).view(experts, outer, inner // _GROUP, _GROUP // 2)
    return blocks, to_exponents(coded.scale).view(experts, outer, inner // _GROUP)


def _grid(weight: Tensor) -> Grid:
    shape = weight.shape[0], weight.shape[1]
    return Grid(Partition.tiles(shape, (1, _GROUP)), Float4(weight.device), round_scale=stored_power)
