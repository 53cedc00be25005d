"""Integers of 4 and 8 bits and float8 as ``DequantizeLinear``, of the ONNX standard."""

from __future__ import annotations

import torch
from torch import Tensor

from oftfx.grids import Float8, Integers
from oftfx.onnx.lower.stand_in import FloatProduct
from oftfx.onnx.lower.weight import Weight, are_codes, narrowed, packed
from oftfx.onnx.markers import INT4, UINT4, marked

_OPENVINO_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class DequantizeLinear(FloatProduct):
    """``(q - zero) * scale`` with one scale for all, for a row, or (from opset 21) for a block of a row.

    Symmetric integers are signed and have no zeros.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None

    @classmethod
    def fits(cls, weight: Weight, dialect: str) -> bool:
        """Tiles; integers of 3 to 8 bits with zeros of the same type; float8.

        OpenVINO takes no rows that end within a block, reads 4-bit weights with an odd number of columns wrong, and
        leaves out a rounding to bfloat16.
        """
        if weight.partition.kind != "tiles":
            return False
        if dialect == "openvino" and (weight.rounds_coarsely or _is_ragged(weight)):
            return False
        if isinstance(weight.levels, Float8):
            return dialect != "openvino" or weight.levels.dtype in _OPENVINO_FLOAT8
        integers = isinstance(weight.levels, Integers) and 3 <= weight.bits <= 8
        return integers and dialect != "openvino" and _coded(weight) is not None

    def __init__(self, weight: Weight, dialect: str) -> None:
        super().__init__(weight, dialect)
        self.rounded = weight.rounded
        high, wide = weight.partition.tile
        self.groups = -(-self.in_features // wide)
        self.high, self.block_size = high, wide if self.groups > 1 else 0
        self.per_row = high < self.out_features or self.groups > 1
        self.register_buffer("scales", narrowed(weight.scale))
        self.register_buffer("zeros", None)
        self.kind: int | None = None
        if isinstance(weight.levels, Float8):
            self.register_buffer("qweight", weight.codes.contiguous().view(weight.levels.dtype))
        else:
            self._hold_integers(weight)
        small = self.kind is not None
        self.opset = 21 if small or self.block_size else 19

    def _hold_integers(self, weight: Weight) -> None:
        coded = _coded(weight)
        assert coded is not None
        codes, zeros = coded
        if zeros is not None and not self.per_row:
            zeros = zeros[0, 0]
        elif zeros is not None and not self.block_size:
            zeros = zeros[:, 0]
        self.zeros_shape = None if zeros is None else tuple(zeros.shape)
        if weight.bits <= 4:
            self.kind = INT4 if zeros is None else UINT4
            codes, zeros = (None if t is None else packed(t.reshape(-1) & 15, 4) for t in (codes, zeros))  # type: ignore[assignment]
        else:
            own = torch.int8 if zeros is None else torch.uint8
            codes, zeros = (None if t is None else t.to(own) for t in (codes, zeros))  # type: ignore[assignment]
        self.register_buffer("qweight", codes)
        self.register_buffer("zeros", zeros)

    def weight(self) -> Tensor:
        """One operator; where a block has several rows, scales are repeated before it."""
        scales = marked(self.scales)
        # An operator with scales in float16 multiplies in float16, as the layer does, or it must not have them.
        exact = scales.dtype == torch.float32 or (scales.dtype == torch.float16 and self.rounded == torch.float16)
        scales = self._by_row(scales if exact else scales.float())
        shape = (self.out_features, self.in_features)
        inputs = [marked(self.qweight, self.kind, shape if self.kind else None), scales]
        if self.zeros is not None:
            inputs.append(marked(self.zeros, self.kind, self.zeros_shape if self.kind else None))
        attributes = {"axis": 1, "block_size": self.block_size} if self.block_size else {"axis": 0}
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", inputs, attributes if self.per_row else {}, dtype=scales.dtype, shape=shape
        )

    def _by_row(self, scales: Tensor) -> Tensor:
        if not self.per_row:
            return scales.reshape(())
        scales = scales.reshape(-1, self.groups)
        if self.high > 1:
            scales = scales.unsqueeze(1).expand(-1, self.high, -1).flatten(0, 1)
            scales = scales if len(scales) == self.out_features else scales[: self.out_features]
        return scales if self.block_size else scales.reshape(-1)


def _is_ragged(weight: Weight) -> bool:
    return weight.shape[1] % weight.partition.tile[1] != 0


def _coded(weight: Weight) -> tuple[Tensor, Tensor | None] | None:
    """Codes ``(out, in)`` and zeros ``(out, groups of a row)``: signed and none, or unsigned and some.

    None where the zeros are no integers, or not of the type of the codes.
    """
    levels, zero = weight.levels, weight.zero
    assert isinstance(levels, Integers)
    storage = 4 if weight.bits <= 4 else 8
    half = 2 ** (storage - 1)
    if not isinstance(zero, Tensor) and zero == int(zero) and -half <= levels.low - zero and levels.high - zero < half:
        return weight.codes - int(zero), None
    codes, zeros = weight.unsigned()
    return (codes, zeros.to(torch.int16)) if are_codes(zeros, storage) else None
