"""bitsandbytes 4-bit: NF4 and FP4, with or without double quantization (``bitsandbytes.nn.Linear4bit``).

Storage: ``weight`` uint8 ``(out * in / 2, 1)`` (or the same bytes viewed as ``quant_storage``), two codes a byte, the
first in the high nibble, row-major over the flattened weight; one ``absmax`` per ``blocksize`` consecutive codes.
``W = code[c] * absmax``. With double quantization absmax is itself uint8:
``absmax = state2.code[u] * state2.absmax[i // 256] + offset``.

On a CPU with AVX512-BF16 the layer's first eval forward without gradients rewrites all of that in place (other layout,
absmax in bfloat16). The package then dequantizes garbage and loses gradients. `prepare` forbids the repacking and
undoes one that has happened; `dequantize` reads both layouts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState
from oftfx.formats.by_name import class_named
from oftfx.formats.packing import bnb4_cpu
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Grid, Partition, Table

_PACK_ROWS = 32  # rows that the CPU layout interleaves
_CPU_STEP = 16  # elements that its dequantization takes at a time, with the scale of the first


class _Nested(NamedTuple):
    """How scales are stored when they are quantized as well."""

    absmax: Tensor
    state2: Any
    offset: Any


class _DoubleQuantization:
    """Scales less their mean, in 8-bit codes under one scale for 256 of them, as the package rounds them.

    Args:
        second: the QuantState of the scales, whose table and block size are kept.
    """

    def __init__(self, second: Any) -> None:
        self.second, self.table = second, Table(second.code.float())

    def __call__(self, scale: Tensor) -> tuple[Tensor, _Nested]:
        """The scales that come out, and what is stored."""
        offset = scale.mean()
        partition = Partition.flat((1, scale.numel()), self.second.blocksize)
        grid = Grid(partition, self.table, least_scale=1e-12)
        coded = grid.fit((scale - offset).unsqueeze(0))
        second = copy.copy(self.second)
        second.absmax = coded.scale
        return grid.values(coded)[0] + offset, _Nested(coded.codes[0], second, offset)


class Bnb4(ScalarFormat):
    """``Linear4bit`` and its subclasses, recognised by class name and quant_state."""

    name = "bnb4"

    def matches(self, module: nn.Module) -> bool:
        """A quantized Linear4bit; one that was never moved to a device still holds floats and is not."""
        return class_named(module, "bitsandbytes", "Linear4bit") is not None and _quant_state(module) is not None

    def geometry(self, module: nn.Module) -> Geometry:
        """From quant_state, which keeps the logical shape."""
        out_features, in_features = _state(module).shape
        return Geometry("linear", in_features, out_features)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype the weight had before quantization (the CPU packing overwrites it)."""
        state = _state(module)
        return getattr(state, "original_dtype", None) or state.dtype

    def grid(self, module: nn.Module) -> Grid:
        """Runs of ``blocksize`` elements, which may cross rows, scaled into the table of nf4 or fp4."""
        state = _state(module)
        return flat_grid(tuple(state.shape), state)

    def codes(self, module: nn.Module) -> Codes:
        """From either layout."""
        state = _state(module)
        return flat_codes(module.weight, tuple(state.shape), state)  # type: ignore[arg-type]

    def dequantize(self, module: nn.Module) -> Tensor:
        """``code[c] * absmax``, by the package where that is the same to the bit."""
        weight, state = module.weight.data, _state(module)
        quickly = None if _is_packed(state) else bnb4_cpu.looked_up(weight, state, _absmax(state))  # type: ignore[arg-type]
        return super().dequantize(module) if quickly is None else quickly

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """Two codes a byte, and a Params4bit and QuantState with the settings of ``like``."""
        old, state = like.weight, copy.copy(_state(like))
        raw = packed_bytes(coded, state)
        state.dtype = self.dtype(like)
        state.packing_format_for_cpu = False
        parameter = copy.copy(old)
        parameter.data, parameter.quant_state, parameter.bnb_quantized = (
            raw.view(_storage(old)).unsqueeze(1),
            state,
            True,
        )
        return {"weight": parameter, "quant_state": state}

    def read(self, module: nn.Module) -> WeightState:
        """The Params4bit and the quant_state that the layer keeps beside it."""
        return {"weight": module.weight, "quant_state": _state(module)}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace both."""
        parameter = state["weight"]
        parameter.module = module
        module._parameters["weight"] = parameter
        module.quant_state = state["quant_state"]  # type: ignore[assignment]

    def load_state(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """As transformers does it: the package's own ``load_state_dict`` knows no quantized weight."""
        stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
        device = module.weight.device
        weight = type(module.weight).from_prequantized(  # type: ignore[operator, union-attr]
            state["weight"], stats, device=device, module=module
        )
        self.write(module, {"weight": weight, "quant_state": weight.quant_state})
        if module.bias is not None:
            module.bias.data.copy_(state["bias"])  # type: ignore[operator]

    def nbytes(self, module: nn.Module) -> int:
        """Codes and scales."""
        state = _state(module)
        tensors = [module.weight.data, state.absmax]
        if state.nested:
            tensors += [state.state2.absmax, state.state2.code]
        return sum(t.numel() * t.element_size() for t in tensors)

    def native_fault(self, module: nn.Module) -> str | None:
        """On a CPU: rows that are no whole number of blocks, where the package takes sixteen elements at a time."""
        return scale_fault(_state(module), module.weight.device)  # type: ignore[arg-type]

    def fault_depends_on_device(self, module: nn.Module) -> bool:
        """Rows that are no whole number of blocks."""
        return scale_fault(_state(module), torch.device("cpu")) is not None

    def own(self, module: nn.Module) -> None:
        """A Params4bit and a QuantState of its own over the same bytes."""
        parameter, state = copy.copy(module.weight), copy.copy(_state(module))
        parameter.quant_state = state
        self.write(module, {"weight": parameter, "quant_state": state})

    def hold_still(self, module: nn.Module) -> Callable[[], None]:
        """Forbid the CPU repacking."""
        before = module.support_avx512bf16_for_cpu
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        return lambda: setattr(module, "support_avx512bf16_for_cpu", before)

    def prepare(self, module: nn.Module) -> str | None:
        """Forbid the CPU repacking; where it has happened, restore the layout (absmax keeps bfloat16's 8 bits)."""
        self.hold_still(module)
        state = _state(module)
        if not _is_packed(state):
            return None
        _unpack(module.weight, state)
        return (
            "an earlier eval forward had repacked this weight for the CPU and rounded its scales to bfloat16 "
            "(relative error 2e-3); the layout is restored, the rounding cannot be undone"
        )

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """NF4 without double quantization, quantized on the CPU."""
        return make_linear4bit(nn.Linear(in_features, out_features, bias=bias))


def make_linear4bit(
    linear: nn.Linear, *, quant_type: str = "nf4", double_quant: bool = False, **kwargs: Any
) -> nn.Module:
    """Quantize a float Linear into a ``bitsandbytes.nn.Linear4bit``; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        quant_type: ``"nf4"`` or ``"fp4"``.
        double_quant: quantize the scales as well.
        **kwargs: further arguments of ``Linear4bit``.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "bnb", "Making a 4-bit layer") from error
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        quant_type=quant_type,
        compress_statistics=double_quant,
        **kwargs,
    )
    layer.load_state_dict({k: v.detach().clone() for k, v in linear.state_dict().items()})
    return layer.to(linear.weight.device).requires_grad_(False)


def scale_fault(state: Any, device: torch.device) -> str | None:
    """Why the package dequantizes a weight wrong there; None where it does not.

    Only its kernel for AVX-512 takes sixteen elements at a time.
    """
    columns = state.shape[-1]
    if device.type != "cpu" or columns % state.blocksize == 0 or columns % _CPU_STEP:
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    return "bitsandbytes' CPU kernel takes wrong scales for blocks that cross rows"


def flat_grid(shape: tuple[int, int], state: Any, rounded: torch.dtype = torch.float32) -> Grid:
    """Of a matrix that one QuantState describes; ``rounded``: the dtype of what its runtime makes of it."""
    return Grid(
        Partition.flat(shape, state.blocksize),
        Table(state.code.float()),
        rounded=rounded,
        couple=_DoubleQuantization(state.state2) if state.nested else None,
    )


def flat_codes(weight: Tensor, shape: tuple[int, int], state: Any) -> Codes:
    """Codes of the bytes ``weight``, whichever layout they are in."""
    parts = _Nested(state.absmax, state.state2, state.offset) if state.nested else None
    return Codes(_codes(weight, state).reshape(shape), _absmax(state).contiguous(), parts=parts)


def packed_bytes(coded: Codes, state: Any) -> Tensor:
    """Two codes a byte, uint8; the scales go into ``state``."""
    flat = coded.codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    if state.nested:
        parts: _Nested = coded.parts
        state.absmax, state.state2, state.offset = parts
    else:
        state.absmax = coded.scale
    return (flat[::2] << 4) | flat[1::2]


def scales_of(module: nn.Module) -> Tensor:
    """One float32 scale per block of an unpacked layer, double quantization undone."""
    return _absmax(_state(module)).contiguous()


def _quant_state(module: nn.Module) -> Any:
    return getattr(module._parameters.get("weight"), "quant_state", None) or getattr(module, "quant_state", None)


def _state(module: nn.Module) -> Any:
    state = _quant_state(module)
    if state is None:
        raise FormatError(
            f"{type(module).__name__}({module.in_features}, {module.out_features}) has no quant_state: it was never "
            "quantized. Move it to a device first, e.g. layer.to('cpu')"
        )
    return state


def _storage(weight: Any) -> torch.dtype:
    """The dtype as which the bytes are kept."""
    return getattr(weight, "quant_storage", None) or torch.uint8


def _is_packed(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _codes(weight: Tensor, state: Any) -> Tensor:
    """4-bit codes, uint8, flat in the order of the weight's elements."""
    count = math.prod(state.shape)
    raw = weight.data.reshape(-1).view(torch.uint8)
    if not _is_packed(state):
        return torch.stack([raw >> 4, raw & 15], dim=1).reshape(-1)[:count]
    # CPU layout: groups of 32 rows, within a group column pairs first; each 32 bytes hold 32 low codes, then 32 high.
    rows, columns = state.shape
    pairs = raw.reshape(-1, _PACK_ROWS)
    codes = torch.cat([pairs & 15, pairs >> 4], dim=1)
    return codes.reshape(rows // _PACK_ROWS, columns // 2, _PACK_ROWS, 2).transpose(1, 2).reshape(-1)


def _absmax(state: Any) -> Tensor:
    """One float32 scale per block, flat."""
    if _is_packed(state):  # bfloat16 (in / blocksize, out)
        return state.absmax.float().T.reshape(-1)
    if not state.nested:
        return state.absmax.float()
    second = state.state2
    scale = second.absmax.float().repeat_interleave(second.blocksize)[: state.absmax.numel()]
    return second.code.float()[state.absmax.long()] * scale + state.offset


def _unpack(weight: Any, state: Any) -> None:
    """Bring a repacked weight back to the format's own layout, in place, scales in float32 without nesting."""
    codes, absmax = _codes(weight, state), _absmax(state).contiguous()
    raw = (codes[::2] << 4) | codes[1::2]
    storage = getattr(state, "original_storage_type", None)
    shape = getattr(state, "original_qshape", (raw.numel(), 1))
    weight.data = raw.reshape(shape) if storage is None else raw.view(storage).reshape(-1, 1)
    state.absmax, state.nested = absmax, False
    state.dtype = getattr(state, "original_dtype", torch.float32)
    state.packing_format_for_cpu = False
    weight.quant_state = state
