"""Any weight by plain operators: codes looked up in a table (or cast), less a zero, times a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from oftfx.grids import Float8, Integers, Partition
from oftfx.onnx.lower.stand_in import FloatProduct
from oftfx.onnx.lower.weight import Weight, are_codes, narrowed, packed
from oftfx.onnx.markers import marked

_CAST = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Float8 types that every runtime casts; the bytes of others are looked up."""


class LookUp(FloatProduct):
    """``(level(code) - zero) * scale`` by ``Gather`` or ``Cast``, ``Sub`` and ``Mul``, whatever the groups.

    Codes of up to 4 bits lie several in a byte, the first in the high bits (as bitsandbytes has them), and a byte
    is looked up whole: ``levels`` has a row of as many levels for each of the 256. Zeros that are such integers as
    well are stored and looked up in the same way.
    """

    qweight: Tensor
    levels: Tensor | None
    scales: Tensor
    zeros: Tensor | None

    @classmethod
    def fits(cls, weight: Weight, dialect: str) -> bool:
        """Everything of up to 8 bits, but that OpenVINO leaves out a rounding to bfloat16."""
        return weight.bits <= 8 and not (dialect == "openvino" and weight.rounds_coarsely)

    def __init__(self, weight: Weight, dialect: str) -> None:
        super().__init__(weight, dialect)
        self.rounded = weight.rounded
        self.partition = weight.partition
        zeros = weight.zero if isinstance(weight.zero, Tensor) else torch.full((1,), weight.zero)
        codes, levels = weight.codes, weight.levels
        table: Tensor | None = None
        if isinstance(levels, Integers):
            codes, zeros = codes - levels.low, zeros - levels.low
        bits = next(b for b in (1, 2, 4, 8) if b >= weight.bits)
        if isinstance(levels, Integers) and bits == 8:
            codes = codes.to(torch.uint8)
        elif isinstance(levels, Float8) and levels.dtype in _CAST:
            codes = codes.contiguous().view(levels.dtype)
        else:
            codes = packed(codes.reshape(-1), bits, high_first=True)
            table = _rows(torch.arange(2**bits).float() if isinstance(levels, Integers) else _values(weight), bits)
        self.register_buffer("qweight", codes)
        self.register_buffer("levels", None if table is None else narrowed(table))
        self.register_buffer("scales", narrowed(weight.scale))
        self.groups = zeros.numel()
        several = self.groups > 1 and isinstance(levels, Integers) and table is not None
        self.packs_zeros = several and are_codes(zeros, bits)
        zeros = packed(zeros.round(), bits, high_first=True) if self.packs_zeros else narrowed(zeros)
        self.register_buffer("zeros", zeros if bool(zeros.any()) else None)

    def weight(self) -> Tensor:
        """Element by element."""
        shape = (self.out_features, self.in_features)
        if self.levels is None:
            levels = marked(self.qweight).to(torch.float32)
        else:
            levels = looked_up(self.qweight, self.levels, shape[0] * shape[1]).reshape(shape)
        if self.zeros is not None and self.packs_zeros:
            assert self.levels is not None
            levels = levels - self._expanded(looked_up(self.zeros, self.levels, self.groups))
        elif self.zeros is not None:
            levels = levels - self._expanded(marked(self.zeros).to(torch.float32))
        return levels * self._expanded(marked(self.scales).to(torch.float32))

    def _expanded(self, values: Tensor) -> Tensor:
        """One value a group, as ``(out, in)`` or what is broadcast to it."""
        return values if values.numel() == 1 else expanded(values, self.partition)


class WholeValues(FloatProduct):
    """Codes of a weight with one scale, looked up in a table of the values themselves, after all rounding.

    For runtimes that leave out a rounding to bfloat16.
    """

    qweight: Tensor
    levels: Tensor

    @classmethod
    def fits(cls, weight: Weight, dialect: str) -> bool:
        """One scale and zero for all, and a rounding that has to be in the table."""
        return dialect == "openvino" and weight.rounds_coarsely and len(weight.scale) == 1 and weight.bits <= 8

    def __init__(self, weight: Weight, dialect: str) -> None:
        super().__init__(weight, dialect)
        low = weight.levels.low if isinstance(weight.levels, Integers) else 0
        codes = (weight.codes - low).to(torch.uint8) if low else weight.codes.to(torch.uint8)
        bits = next(b for b in (1, 2, 4, 8) if b >= weight.bits)
        every = torch.arange(2**bits, dtype=torch.int16) + low
        decoded = weight.levels.decode(every if isinstance(weight.levels, Integers) else every.to(torch.uint8))
        values = (decoded - weight.zero) * weight.scale
        assert weight.rounded is not None
        self.register_buffer("qweight", packed(codes.reshape(-1), bits, high_first=True))
        self.register_buffer("levels", _rows(values.to(weight.rounded).float(), bits))

    def weight(self) -> Tensor:
        """By one ``Gather``."""
        count = self.out_features * self.in_features
        return looked_up(self.qweight, self.levels, count).reshape(self.out_features, self.in_features)


def looked_up(codes: Tensor, table: Tensor, count: int) -> Tensor:
    """Float32 ``(count,)``: rows of ``table (256, codes a byte)`` for the bytes ``codes``, one after another."""
    values = torch.index_select(marked(table).to(torch.float32), 0, marked(codes).to(torch.int32)).flatten()
    return values if values.numel() == count else values[:count]


def expanded(values: Tensor, cut: Partition) -> Tensor:
    """`Partition.expand` by operators that repeat: ``(groups,)`` as ``(rows, columns)``, or broadcast to it."""
    rows, columns = cut.rows, cut.columns
    high, wide = cut.tile
    if cut.kind == "strided":
        return values.unsqueeze(0).expand(wide, -1).reshape(rows, columns)
    if cut.kind == "flat":
        flat = values.unsqueeze(1).expand(-1, wide).flatten()
        return (flat if flat.numel() == rows * columns else flat[: rows * columns]).reshape(rows, columns)
    down, across = -(-rows // high), -(-columns // wide)
    matrix = values.reshape(down, across)
    if high > 1 and down > 1:
        matrix = matrix.unsqueeze(1).expand(-1, high, -1).flatten(0, 1)
        matrix = matrix if len(matrix) == rows else matrix[:rows]
    if across > 1:
        matrix = matrix.unsqueeze(2).expand(-1, -1, wide).flatten(1)
        matrix = matrix if matrix.shape[1] == columns else matrix[:, :columns]
    return matrix


def _values(weight: Weight) -> Tensor:
    """What each code stands for."""
    if isinstance(weight.levels, Float8):
        return weight.levels.decode(torch.arange(256, dtype=torch.uint8))
    return weight.levels.values.cpu()  # type: ignore[attr-defined]


def _rows(values: Tensor, bits: int) -> Tensor:
    """``(256, 8 / bits)``: for each byte the values of the codes in it, the highest first; unused codes count as 0."""
    per = 8 // bits
    values = torch.nn.functional.pad(values, (0, 2**bits - len(values)))
    shifts = torch.arange(bits * (per - 1), -1, -bits)
    return values[(torch.arange(256).unsqueeze(1) >> shifts) & (2**bits - 1)].contiguous()
