"""Integers of 2 to 8 bits as ``com.microsoft::MatMulNBits``, which ONNX Runtime and OpenVINO have."""

from __future__ import annotations

import torch
from torch import Tensor

from oftfx.grids import Integers
from oftfx.onnx.lower.stand_in import StandIn
from oftfx.onnx.lower.weight import Weight, are_codes, narrowed, packed
from oftfx.onnx.markers import marked

_SMALLEST, _LARGEST = 16, 256  # blocks; larger ones are computed by slower code


class MatMulNBits(StandIn):
    """``x @ ((q - zero) * scale)^T``, activations in floats (accuracy level 0).

    Groups that are no block of the operator are cut into equal blocks with one scale. Storage is of 2, 4 or 8 bits, so
    3 bits take 4, and 5 to 7 take 8.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    computes_zeros = True  # OpenVINO takes zeros that are stored in float32, one a block, and no others

    @classmethod
    def fits(cls, weight: Weight, dialect: str) -> bool:
        """Integers above one bit in groups along the rows, with zeros that the storage has (or floats, to 4 bits).

        Where OpenVINO would have to be given several copies of a float zero, a table is smaller.
        """
        if not isinstance(weight.levels, Integers) or not 2 <= weight.bits <= 8 or weight.rounds_coarsely:
            return False
        block = _block(weight) if weight.partition.kind == "tiles" else None
        coded = None if block is None else _coded(weight)
        if block is None or coded is None:
            return False
        floats = coded[1] is not None and coded[1].is_floating_point()
        return not (floats and dialect == "openvino" and _repeats(weight, block) > 1)

    def __init__(self, weight: Weight, dialect: str) -> None:
        super().__init__(weight, dialect)
        coded, block = _coded(weight), _block(weight)
        assert coded is not None
        assert block is not None
        codes, zeros, self.bits = coded
        self.block_size, self.blocks = block, -(-self.in_features // block)
        codes = torch.nn.functional.pad(codes, (0, -self.in_features % block)).unflatten(1, (-1, block))
        self.register_buffer("qweight", packed(codes, self.bits))
        self.repeats = _repeats(weight, block)
        self.register_buffer("scales", narrowed(weight.by_row(weight.scale)))
        if zeros is not None and not zeros.is_floating_point():
            zeros = packed(self._by_block(zeros), self.bits)
        elif zeros is not None and dialect != "openvino":
            zeros = narrowed(zeros)
        elif zeros is not None:
            zeros, self.computes_zeros = self._by_block(zeros).contiguous(), False
        self.register_buffer("zeros", zeros)

    def product(self, x: Tensor) -> Tensor:
        """One operator; scales and float zeros are brought to the dtype of ``x`` and to one a block before it."""
        wide = x.float() if x.dtype == torch.float64 or not self.computes_zeros else x
        zeros = None if self.zeros is None else marked(self.zeros)
        if zeros is not None and zeros.is_floating_point() and self.computes_zeros:
            zeros = self._by_block(zeros.to(wide.dtype))
        inputs = (wide, marked(self.qweight), self._by_block(marked(self.scales).to(wide.dtype)), zeros)
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            inputs if zeros is not None else inputs[:3],
            {"K": self.in_features, "N": self.out_features, "bits": self.bits, "block_size": self.block_size},
            dtype=wide.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return y.to(x.dtype)

    def _by_block(self, values: Tensor) -> Tensor:
        """``(out, blocks)`` of ``(out, groups of a row)``."""
        if self.repeats == 1:
            return values
        repeated = values.unsqueeze(2).expand(-1, -1, self.repeats).flatten(1)
        return repeated if repeated.shape[1] == self.blocks else repeated[:, : self.blocks]


def _block(weight: Weight) -> int | None:
    """The operator's block: what adds least to the length of a row, then the largest; None where none will do."""
    columns, wide = weight.shape[1], weight.partition.tile[1]
    sizes = [_SMALLEST << i for i in range((_LARGEST // _SMALLEST).bit_length())]
    known = [s for s in sizes if wide >= columns or wide % s == 0]
    return min(known, key=lambda s: (-(-columns // s) * s, -s), default=None)


def _repeats(weight: Weight, block: int) -> int:
    columns, wide = weight.shape[1], weight.partition.tile[1]
    return -(-columns // block) if wide >= columns else wide // block


def _coded(weight: Weight) -> tuple[Tensor, Tensor | None, int] | None:
    """Unsigned codes ``(out, in)``, zeros ``(out, groups of a row)`` or None for the middle, and the bits of storage.

    None where no zeros of the operator will do.
    """
    levels, zero = weight.levels, weight.zero
    assert isinstance(levels, Integers)
    bits = next(b for b in (2, 4, 8) if b >= weight.bits)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    if not isinstance(zero, Tensor):
        shift = middle - zero
        if shift == int(shift) and levels.low + shift >= 0 and levels.high + shift <= top:
            return weight.codes + int(shift), None, bits
    codes, zeros = weight.unsigned()
    if are_codes(zeros, bits):
        return codes, zeros.to(torch.int16), bits
    return (codes, zeros, bits) if bits < 8 else None
