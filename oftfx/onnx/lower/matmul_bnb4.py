"""NF4 and FP4 as ``com.microsoft::MatMulBnb4``, which ONNX Runtime has."""

from __future__ import annotations

import torch
from torch import Tensor

from oftfx.grids import Table
from oftfx.onnx.lower.stand_in import StandIn
from oftfx.onnx.lower.weight import Weight, narrowed, packed
from oftfx.onnx.markers import marked

# fmt: off
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # over 12
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
_TABLES = (tuple(v / 12 for v in _FP4) + tuple(-v / 12 for v in _FP4), _NF4)
"""What the operator has as ``quant_type`` 0 and 1: the levels of codes 0 to 15."""
# fmt: on
_BLOCKS = (256, 128, 64, 32, 16)
_CLOSE = 2e-7  # of float32's rounding of a table


class MatMulBnb4(StandIn):
    """bitsandbytes' own bytes, scales without double quantization, a bias added after it.

    Also takes tables that are a multiple of bitsandbytes' own, in any order of codes.
    """

    weight: Tensor
    absmax: Tensor

    @classmethod
    def fits(cls, weight: Weight, dialect: str) -> bool:  # noqa: ARG003
        """Runs of the flattened weight, in one of the operator's tables."""
        cut, kind = weight.partition, _table(weight)
        runs = cut.kind == "flat" or (cut.kind == "tiles" and cut.tile[0] == 1 and cut.columns % cut.tile[1] == 0)
        return runs and kind is not None and _block(cut.tile[1]) is not None and not weight.rounds_coarsely

    def __init__(self, weight: Weight, dialect: str) -> None:
        super().__init__(weight, dialect)
        block, found = _block(weight.partition.tile[1]), _table(weight)
        assert block is not None
        assert found is not None
        self.quant_type, order, factor = found
        self.block_size, self.repeats = block, weight.partition.tile[1] // block
        codes = order.to(weight.codes.device)[weight.codes.int()].reshape(-1)
        self.register_buffer("weight", packed(codes, 4, high_first=True))
        self.register_buffer("absmax", narrowed(weight.scale * factor))

    def product(self, x: Tensor) -> Tensor:
        """One operator, scales in the dtype of ``x``."""
        wide = x.float() if x.dtype == torch.float64 else x
        absmax = marked(self.absmax).to(wide.dtype)
        if self.repeats > 1:
            absmax = absmax.unsqueeze(1).expand(-1, self.repeats).flatten()
            count = -(-self.in_features * self.out_features // self.block_size)
            absmax = absmax if len(absmax) == count else absmax[:count]
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulBnb4",
            (wide, marked(self.weight), absmax),
            {
                "K": self.in_features,
                "N": self.out_features,
                "block_size": self.block_size,
                "quant_type": self.quant_type,
            },
            dtype=wide.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return y.to(x.dtype)


def _block(size: int) -> int | None:
    return next((b for b in _BLOCKS if size % b == 0), None)


def _table(weight: Weight) -> tuple[int, Tensor, float] | None:
    """The operator's table, the code in it of each code of the layer, and the factor between the two."""
    if not isinstance(weight.levels, Table) or (weight.zero is not None and bool(torch.as_tensor(weight.zero).any())):
        return None
    values = weight.levels.values.double()
    largest = float(values.abs().max())
    for kind, table in enumerate(_TABLES):
        levels = torch.tensor(table, dtype=torch.float64)
        distance = (values.unsqueeze(1) / largest - levels).abs()
        if float(distance.amin(1).max()) > _CLOSE:
            continue
        nearest = distance.argmin(1)
        # fp4 has two zeros; each keeps its bits.
        same = torch.arange(len(values)) if len(values) == len(table) else nearest
        order = torch.where(distance.gather(1, same.unsqueeze(1)).squeeze(1) <= _CLOSE, same, nearest)
        return kind, order.to(torch.uint8), largest
    return None
