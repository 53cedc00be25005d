"""Intel neural-compressor, weights only (``INCWeightOnlyLinear``): integers of 2 to 8 bits, nf4 and fp4.

Storage: ``qweight``, int32 words of ``n_pack = 32 // bits`` codes along the input, the first in the lowest bits (so ten
codes a word at 3 bits, two bits of it unused); ``scales``; for integers ``qzeros``, packed along the output.
``W = (code - zero) * scale``; without ``qzeros`` codes are signed. In Optimum's format, the usual one of integers, all
are transposed (``qweight (in / n_pack, out)``, ``scales (groups, out)`` in float16) and a stored zero is the zero
less 1. The 4-bit codes of nf4 and fp4 stand for entries of a table, in an order of the package's own:
``W = table[code] * scale``.

The first forward keeps a float ``weight`` (a plain attribute, in no state_dict) and never looks at the codes again.
With 8 bits and zeros other than 128 that weight is wrong: ``code - zero`` is cast to int8 and wraps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState
from oftfx.formats.by_name import class_named
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Grid, Integers, Levels, Partition, Table

# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
_E2M1 = (0.0, 1 / 96, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)
_BNB = (0.0, 1 / 16, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)

_TABLES: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "nf4": (_NF4, (7, 1, 2, 3, 4, 5, 6, 0, 8, 9, 10, 11, 12, 13, 14, 15)),
    "fp4_e2m1": ((*(-v for v in _E2M1[:0:-1]), *_E2M1), (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)),
    "fp4": ((*(-v for v in _BNB[:0:-1]), *_BNB), (11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3)),
}
"""Levels in ascending order, and the four bits that stand for each."""
# fmt: on
_TABLES["fp4_e2m1_bnb"] = _TABLES["fp4"]


class IncWeightOnly(ScalarFormat):
    """``INCWeightOnlyLinear``, recognised by class name and its packed buffer."""

    name = "inc_woq"

    def matches(self, module: nn.Module) -> bool:
        """By name; ``HPUWeightOnlyLinear`` is packed in another way and is not."""
        named = class_named(module, "neural_compressor", "INCWeightOnlyLinear") is not None
        return named and "qweight" in module._buffers

    def geometry(self, module: nn.Module) -> Geometry:
        """From the layer's attributes; packed shapes are rounded up."""
        return Geometry("linear", module.in_features, module.out_features)  # type: ignore[arg-type]

    def dtype(self, module: nn.Module) -> torch.dtype:
        """What it multiplies in: on a CPU it widens float16."""
        kept: torch.dtype = module.float_type  # type: ignore[assignment]
        on_cpu = module.scales.device.type == "cpu"  # type: ignore[union-attr]
        return torch.float32 if kept == torch.float16 and on_cpu else kept

    def grid(self, module: nn.Module) -> Grid:
        """Groups of columns, in the order of ``g_idx``; values keep the precision in which the package makes them."""
        layer: Any = module
        kept = layer.scales.dtype
        tile = (1, min(layer.group_size, layer.in_features))
        middle = float(2 ** (layer.bits - 1)) if "qzeros" in layer._buffers else 0.0
        return Grid(
            Partition.tiles((layer.out_features, layer.in_features), tile, _order(layer)),
            _levels(layer),
            "integer" if _has_own_zeros(layer) else middle,
            product=torch.float32 if layer.dtype in _TABLES else kept,
            rounded=layer.float_type,
            round_scale=lambda scale: scale.to(kept).float(),
            least_scale=max(1e-8, torch.finfo(kept).tiny),
        )

    def codes(self, module: nn.Module) -> Codes:
        """Unpacked; of tables, the place of each level in ascending order."""
        layer: Any = module
        shape = (layer.out_features, layer.in_features)
        words = layer.qweight.T if layer.use_optimum_format else layer.qweight
        codes = _unpacked(words, layer, shape, axis=_axis(layer))
        if layer.dtype in _TABLES:
            bits = _TABLES[layer.dtype][1]
            places = [bits.index(b) if b in bits else bits.index(0) for b in range(16)]  # unused ones count as 0
            codes = torch.tensor(places, dtype=torch.uint8, device=codes.device)[codes.int()]
        elif "qzeros" not in layer._buffers:
            codes = codes - ((codes >> (layer.bits - 1)) << layer.bits)  # two's complement
        scale = layer.scales.T if layer.use_optimum_format else layer.scales
        zero = _zeros(layer).float().reshape(-1) if _has_own_zeros(layer) else None
        return Codes(codes, scale.float().reshape(-1), zero)

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """Words, scales and zeros in the shapes that ``like`` has."""
        layer: Any = like
        codes = coded.codes
        if layer.dtype in _TABLES:
            codes = torch.tensor(_TABLES[layer.dtype][1], dtype=torch.int16, device=codes.device)[codes.int()]
        words = _packed(codes, layer, axis=_axis(layer))
        scale = coded.scale.reshape(layer.out_features, -1)
        state = {
            "qweight": (words.T if layer.use_optimum_format else words).contiguous(),
            "scales": (scale.T if layer.use_optimum_format else scale).contiguous().to(layer.scales.dtype),
        }
        if coded.zero is not None:
            state["qzeros"] = _packed_zeros(coded.zero.reshape(layer.out_features, -1), layer)
        elif "qzeros" in layer._buffers:
            state["qzeros"] = layer.qzeros.clone()
        return state

    def native_fault(self, module: nn.Module) -> str | None:
        """8 bits with zeros of their own."""
        if module.bits == 8 and _has_own_zeros(module):
            return "neural-compressor casts `code - zero` to int8, which wraps around in an asymmetric 8-bit layer"
        return None

    def read(self, module: nn.Module) -> WeightState:
        """Words, scales and zeros."""
        return {name: module._buffers[name] for name in ("qweight", "scales", "qzeros") if name in module._buffers}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace them, and drop the float weight that a forward has kept."""
        module._buffers.update(state)
        vars(module).pop("weight", None)

    def nbytes(self, module: nn.Module) -> int:
        """Words, scales and zeros."""
        return sum(t.numel() * t.element_size() for t in self.read(module).values())

    def prepare(self, module: nn.Module) -> str | None:
        """Drop the float weight that a forward has kept: it may be older than the codes."""
        kept: Tensor | None = vars(module).pop("weight", None)
        if kept is None or torch.equal(kept.float(), self.dequantize(module)):
            return None
        return (
            "this layer computed with a weight that it had kept from its first forward and that is not what its codes "
            "stand for (codes were loaded later, or neural-compressor unpacked them wrongly); the codes count now"
        )

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Four bits, asymmetric, groups of 64."""
        return make_inc_woq(nn.Linear(in_features, out_features, bias=bias))


def make_inc_woq(
    linear: nn.Linear,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    dtype: str = "int",
    permutation: Tensor | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Quantize a float Linear into an ``INCWeightOnlyLinear``, nearest codes; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        bits: of integers.
        group_size: columns that share a scale; -1 for all.
        symmetric: one zero for all, in the middle.
        dtype: ``"int"``, ``"nf4"``, ``"fp4"`` or ``"fp4_e2m1"``.
        permutation: columns in the order in which groups are cut (act-order), int64 ``(in,)``.
        **kwargs: further arguments of ``INCWeightOnlyLinear``.
    """
    try:
        from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear
        from neural_compressor.torch.algorithms.weight_only.utility import quant_tensor
    except ImportError as error:
        raise MissingExtraError("neural-compressor", "inc", "Making a weight-only layer") from error
    weight = linear.weight.detach().float().clone()
    if permutation is not None:
        weight = weight[:, permutation]
    scheme = "sym" if symmetric else "asym"
    codes, scale, zero = quant_tensor(
        weight, bits=bits, group_size=group_size, scheme=scheme, dtype=dtype, return_int=True
    )
    if permutation is not None:
        codes = codes[:, torch.argsort(permutation)]
    layer = INCWeightOnlyLinear(
        *(linear.in_features, linear.out_features, dtype, bits, group_size),
        zp=zero is not None,
        bias=linear.bias is not None,
        g_idx=permutation is not None,
        **kwargs,
    )
    bias = None if linear.bias is None else linear.bias.detach()
    layer.pack(codes.to(torch.int32), scale, zero, bias, g_idx=permutation)
    return layer


def _levels(layer: Any) -> Levels:
    if layer.dtype in _TABLES:
        values = torch.tensor(_TABLES[layer.dtype][0], device=layer.qweight.device)
        return Table(values, float(values[-1]))
    if "int" not in layer.dtype:
        raise FormatError(f"INCWeightOnlyLinear stores {layer.dtype!r}; known: int, {', '.join(_TABLES)}")
    half = 2 ** (layer.bits - 1)
    if "qzeros" in layer._buffers:
        return Integers(0, 2 * half - 1, half - 0.5)
    return Integers(-half, half - 1, half - 0.5)


def _axis(layer: Any) -> int:
    """Axis of the weight ``(out, in)`` along which codes are packed."""
    return 1 if layer.use_optimum_format else layer.compression_dim


def _unpacked(words: Tensor, layer: Any, shape: tuple[int, int], axis: int) -> Tensor:
    """Codes of ``shape``, unsigned, int16, from words along ``axis``."""
    shifts = torch.arange(0, layer.bits * layer.n_pack, layer.bits, device=words.device)
    apart = (words.unsqueeze(axis + 1).long() >> shifts.view((-1,) + (1,) * (1 - axis))) & (2**layer.bits - 1)
    return apart.flatten(axis, axis + 1)[: shape[0], : shape[1]].to(torch.int16)


def _packed(codes: Tensor, layer: Any, axis: int) -> Tensor:
    """Words along ``axis`` in the dtype of the layer's; codes that are missing in the last are 0."""
    missing = -codes.shape[axis] % layer.n_pack
    padding = (0, missing) if axis == 1 else (0, 0, 0, missing)
    codes = torch.nn.functional.pad(codes.long() & (2**layer.bits - 1), padding)
    shifts = torch.arange(0, layer.bits * layer.n_pack, layer.bits, device=codes.device)
    apart = codes.unflatten(axis, (-1, layer.n_pack)) << shifts.view((-1,) + (1,) * (1 - axis))
    return apart.sum(axis + 1).to(layer.qweight.dtype)


def _zeros(layer: Any) -> Tensor:
    """Zeros ``(out, groups)``, int16."""
    groups = -(-layer.in_features // layer.group_size)
    words = layer.qzeros
    if not layer.use_optimum_format:
        return _unpacked(words, layer, (layer.out_features, groups), axis=layer.compression_dim)
    stored = _unpacked(words.T, layer, (layer.out_features, groups), axis=0)
    return (stored + 1) & (2**layer.bits - 1)


def _packed_zeros(zero: Tensor, layer: Any) -> Tensor:
    zero = zero.to(torch.int16)
    if not layer.use_optimum_format:
        return _packed(zero, layer, axis=layer.compression_dim)
    return _packed(zero - 1, layer, axis=0).T.contiguous()


def _has_own_zeros(layer: Any) -> bool:
    """Whether groups have zeros of their own; in a symmetric layer all are in the middle."""
    return "qzeros" in layer._buffers and bool((_zeros(layer) != 2 ** (layer.bits - 1)).any())


def _order(layer: Any) -> Tensor | None:
    """Columns by group, where these are not cut from left to right."""
    group: Tensor | None = layer.g_idx
    if group is None:
        return None
    plain = torch.arange(layer.in_features, device=group.device) // layer.group_size
    if torch.equal(group.long(), plain):
        return None
    order = torch.argsort(group, stable=True)
    if not torch.equal(group[order].long(), plain):
        raise FormatError(
            f"INCWeightOnlyLinear({layer.in_features}, {layer.out_features}): its g_idx does not give each group "
            f"{layer.group_size} columns"
        )
    return order
