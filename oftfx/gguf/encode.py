"""A weight in the types of GGUF, and how far what is written is from it.

Blocks of 32 numbers along the input: ``Q4_0`` float16 scale d and 4 bits, ``w = d * (q - 8)``; ``Q4_1`` also a float16
smallest value, ``w = d * q + m``; ``Q8_0`` scale and int8, ``w = d * q``. The first 16 numbers of a block of 4 bits are
the low halves of its bytes. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the package ``gguf``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.integer_layers import stored_integers
from oftfx.errors import ExportError
from oftfx.formats.base import WeightFormat
from oftfx.precision import piece_on, squared_error

FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
BLOCK = 32
_GRIDS = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q8_0": (-128, 127)}


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is written.

    Attributes:
        type: of GGUF.
        data: ``(rows, bytes)`` uint8, or ``(n,)`` float32.
        shape: of the tensor.
        error: relative, of the weight that a reader gets; 0.0 only where every number is the same.
        note: what was kept where the error is not 0, or what was not.
    """

    type: str
    data: Any
    shape: tuple[int, ...]
    error: float
    note: str = ""


def vector(values: Tensor) -> Encoded:
    """A norm or a bias: llama.cpp reads these in float32 only."""
    wide = values.detach().float().cpu()
    error = _error(wide.unsqueeze(0), values.detach().cpu().unsqueeze(0))
    return Encoded("F32", wide.contiguous().numpy(), tuple(values.shape), error)


def matrix(name: str, weight: Tensor, kind: str | None) -> Encoded:
    """A float weight ``(out, in)`` in a type; None: that of its dtype.

    Raises:
        ExportError: the type has no such numbers, or no such rows.
    """
    import numpy as np

    if kind is None:
        kind = FLOATS.get(weight.dtype)
        if kind is None:
            raise ExportError(f"{name} is {weight.dtype}, which GGUF does not have; use model.float() first")
    parts, missed, whole = [], 0.0, 0.0
    for rows in _pieces(weight):
        data = _floats(name, rows, kind)
        bad, all_of_it = squared_error(torch.from_numpy(_decoded(data, kind, rows.shape)), rows.cpu())
        missed, whole = missed + bad, whole + all_of_it
        parts.append(data)
    error = math.sqrt(missed / whole) if whole > 0 else math.sqrt(missed)
    if not math.isfinite(error):
        raise ExportError(f"{name} has numbers that {kind} does not hold; use another quantized= for this model")
    note = "rounded" if error else ""
    return Encoded(kind, parts[0] if len(parts) == 1 else np.concatenate(parts), tuple(weight.shape), error, note)


def quantized_matrix(name: str, layer: nn.Module, weight_format: WeightFormat, kind: str | None) -> Encoded:
    """The weight of a quantized layer; with the numbers that it stores where they fit a type, else rounded as asked.

    Raises:
        ExportError: None was asked for, and no type holds its numbers.
    """
    weight = weight_format.dequantize(layer)
    if kind is None or kind in _GRIDS:
        blocks = _blocks_of(layer, weight_format)
        if not isinstance(blocks, str):
            for candidate in _GRIDS if kind is None else (kind,):
                data, why = blocks.encoded(candidate)
                if data is None or (kind is None and why):
                    blocks.reason = why  # in the end that of the widest type
                    continue
                found = torch.from_numpy(_decoded(data, candidate, weight.shape))
                error = _error(found, weight.cpu())
                note = why or "codes and scales kept; the layer rounds each product, a reader of GGUF does not"
                return Encoded(candidate, data, tuple(weight.shape), error, note if error else "")
        if kind is None:
            raise ExportError(
                f"{name}: {blocks if isinstance(blocks, str) else blocks.reason}; no type of GGUF holds this layer to "
                "the bit. quantized='F32' or 'F16' writes floats; 'Q8_0', 'Q4_1' or 'Q4_0' rounds, and the report "
                "says by how much"
            )
    return matrix(name, weight, kind)


class _Blocks:
    """A layer of integers in groups of columns: codes less their zeros ``(out, in)``, and scales ``(out, blocks)``."""

    def __init__(self, codes: Tensor, zeros: Tensor, scales: Tensor) -> None:
        self.codes, self.zeros, self.scales, self.reason = codes, zeros, scales, ""

    def encoded(self, kind: str) -> tuple[Any, str]:
        """Bytes ``(out, bytes)``, or None; and what of the stored numbers is not in them."""
        low, high = _GRIDS[kind]
        rows = len(self.codes)
        levels = (self.codes.unflatten(1, (-1, BLOCK)) - self.zeros.unsqueeze(2)).to(torch.int16)
        d = self.scales.half()
        why = "" if torch.equal(d.float(), self.scales) else "its scales are no float16"
        if not bool(d.isfinite().all()):
            return None, "its scales are too large for float16"
        heads = [d]
        if kind == "Q4_1":
            least = self.zeros.new_full((), float(self.codes.min()))
            smallest = (least - self.zeros) * self.scales
            m = smallest.half()
            heads.append(m)
            levels = (self.codes.unflatten(1, (-1, BLOCK)) - least).to(torch.int16)
            if not torch.equal(m.float(), smallest):
                why = why or "its smallest values are no float16"
            if not bool(m.isfinite().all()):
                return None, "its smallest values are too large for float16"
        if int(levels.min()) < low or int(levels.max()) > high:
            return None, f"its codes reach from {int(levels.min())} to {int(levels.max())}"
        if kind == "Q8_0":
            body = levels.to(torch.int8).view(torch.uint8)
        else:
            half = (levels - low).to(torch.uint8).unflatten(2, (2, BLOCK // 2))
            body = half[:, :, 0] | (half[:, :, 1] << 4)
        head = torch.stack(heads, 2).view(torch.uint8)
        data = torch.cat([head, body], 2).reshape(rows, -1)
        return data.cpu().numpy(), why and f"codes kept, but {why}"


def _blocks_of(layer: nn.Module, weight_format: WeightFormat) -> _Blocks | str:
    found = stored_integers(layer, weight_format)
    if isinstance(found, str):
        return found
    grid, coded, zero = found
    rows, columns = coded.codes.shape
    size = grid.partition.tile[1]
    if columns % BLOCK or size % BLOCK:
        return f"its {columns} inputs in groups of {size} are no blocks of {BLOCK}"
    repeats = size // BLOCK
    by_block = [v.float().view(rows, -1).repeat_interleave(repeats, 1) for v in (zero, coded.scale)]
    return _Blocks(coded.codes.to(torch.int16), *by_block)


def _floats(name: str, rows: Tensor, kind: str) -> Any:
    """Rows as bytes."""
    import gguf
    import numpy as np

    if kind in BLOCKS and rows.shape[1] % BLOCK:
        raise ExportError(f"{name}: {kind} is of blocks of {BLOCK}, and it has {rows.shape[1]} inputs; use 'F16'")
    if kind == "BF16":
        return rows.bfloat16().contiguous().view(torch.uint8).cpu().numpy()
    with np.errstate(over="ignore"):  # seen in the error
        data = gguf.quants.quantize(rows.float().cpu().contiguous().numpy(), gguf.GGMLQuantizationType[kind])
    return data.view(np.uint8)


def _decoded(data: Any, kind: str, shape: torch.Size) -> Any:
    """What the package reads."""
    import gguf
    import numpy as np

    found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return np.ascontiguousarray(found, dtype=np.float32).reshape(tuple(shape))


def _pieces(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.detach().split(max(1, piece_on(torch.device("cpu")) * 16 // max(1, weight.shape[1])))


def _error(got: Tensor, expected: Tensor) -> float:
    missed, whole = squared_error(got, expected)
    return math.sqrt(missed / whole) if whole > 0 else math.sqrt(missed)
