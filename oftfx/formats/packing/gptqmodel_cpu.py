"""What gptqmodel's CPU kernels do to a weight in their first inference forward, how it is read then, and undone.

``TorchAten...`` and ``TorchCpuAvx512...`` layers decide once, in their first forward, on ``linear_mode``: ``"train"``
(dequantize and multiply, differentiable) or ``"inference"``. For the latter they replace their buffers:

======  ============================================  =============================================
buffer  Aten                                          AVX512
======  ============================================  =============================================
qweight uint8, tiles of ``aten::_weight_int4pack_mm``  uint8, 32 rows by pairs of columns
qzeros  ``(8 - zero) * scale``                        uint8, the zeros
scales  in the dtype of the first input (rounded)     float32 (exact); the bias as well
======  ============================================  =============================================

with columns sorted by group. Such a layer gives no gradients, refuses other input dtypes, and is saved to a file that
nothing loads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError
from oftfx.formats.packing.zero_points import Stored

_UNTOUCHED: dict[str, Any] = {"linear_mode": None, "_cpu_transformed": False, "_cpu_transform_dtype": None}
_OF_KERNEL = ("ret_idx", "_ret_idx_identity", "scales_and_zeros", "_dequant_scales_dtype")
_COLUMNS = 512  # whose codes are asked for in one product
_ROUNDED = (
    "an earlier eval forward in bfloat16 had repacked this weight for the CPU and rounded its scales (relative error "
    "4e-3); the packing is undone, the rounding cannot be"
)


def is_repacked(module: nn.Module) -> bool:
    """Whether the buffers are the kernel's."""
    return bool(vars(module).get("_cpu_transformed"))


def scale_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that the scales had before; float16, which files have, where nothing tells."""
    if not is_repacked(module):
        return module.scales.dtype  # type: ignore[union-attr, return-value]
    kept: torch.dtype | None = vars(module).get("_dequant_scales_dtype")
    if kept is not None:
        return kept
    bias: Tensor | None = getattr(module, "bias", None)
    return torch.float16 if bias is None else bias.dtype


def unpacked(module: nn.Module) -> Stored:
    """The weight of a repacked layer, columns in their own order. Scales that were rounded stay so."""
    buffers = module._buffers
    qweight, qzeros, scales = buffers["qweight"], buffers["qzeros"], buffers["scales"]
    assert qweight is not None
    assert qzeros is not None
    assert scales is not None
    if qzeros.is_floating_point():
        codes = _aten_codes(qweight, 2 * qweight.shape[1])
        # A scale of 0 has lost its zero; the weight is 0 with any.
        zeros = 8 - (qzeros.float() / scales.float()).nan_to_num().round()
    else:
        codes, zeros = _avx512_codes(qweight), qzeros
    order = vars(module).get("ret_idx")
    if order is not None:
        codes = codes[:, torch.argsort(order)]
    return Stored(codes, zeros.to(torch.int16), scales.to(scale_dtype(module)))


def _aten_codes(qweight: Tensor, columns: int) -> Tensor:
    """Codes ``(out, in)``. How they lie depends on the CPU, so the kernel is asked: it multiplies unit vectors."""
    if columns % 32:
        raise FormatError(
            f"{columns} columns have been repacked for a kernel that takes multiples of 32, and cannot be read any "
            "more: load the layer again, with backend 'torch'"
        )
    ones = torch.zeros(columns // 32, len(qweight), 2, dtype=torch.bfloat16)
    ones[..., 0], ones[..., 1] = 1, 8  # scale 1, and code - 8 + 8
    eye = torch.eye(columns, dtype=torch.bfloat16).split(_COLUMNS)
    return torch.cat([torch.ops.aten._weight_int4pack_mm_for_cpu(e, qweight, 32, ones) for e in eye]).T.to(torch.int16)


def _avx512_codes(qweight: Tensor) -> Tensor:
    """Codes ``(out, in)``: of 32 rows and two columns, rows ``r`` and ``r + 16`` share a byte, low and high."""
    pairs = qweight.reshape(-1, qweight.shape[1], 16, 2).transpose(1, 2)
    return torch.stack([pairs & 15, pairs >> 4], dim=1).reshape(len(qweight), -1).to(torch.int16)


def marks(module: nn.Module) -> dict[str, Any]:
    """The attributes that say what the buffers are; they go with the buffers."""
    return {n: vars(module)[n] for n in (*_UNTOUCHED, *_OF_KERNEL) if n in vars(module)}


def plain_marks(module: nn.Module) -> dict[str, Any]:
    """What they are to be with buffers in the checkpoint's packing; a mode that was forced stays."""
    if not is_repacked(module):
        return marks(module)
    return {n: v for n, v in _UNTOUCHED.items() if n in vars(module)}


def set_marks(module: nn.Module, state: dict[str, Any]) -> None:
    """Put marks into the layer; none of the old ones stays."""
    for name in (*_UNTOUCHED, *_OF_KERNEL):
        vars(module).pop(name, None)
    vars(module).update(state)


def hold_still(module: Any) -> Callable[[], None]:
    """Forbid repacking, until the function returned is called."""
    if vars(module).get("linear_mode", "train") is not None:  # no kernel that repacks, or one that has decided
        return lambda: None
    module.linear_mode = "train"
    return lambda: setattr(module, "linear_mode", None)


def settle(module: Any, packed: Callable[[Stored, Any], dict[str, Any]]) -> str | None:
    """Never let the layer repack, undo it where it has, let ``train()`` work, and dequantize without compiled code.

    Args:
        module: any layer of GPTQ or AWQ.
        packed: words, scales and marks for an unpacked weight in the packing of a file.

    Returns:
        A notice where the kernel had rounded scales.
    """
    notice = None
    if is_repacked(module):
        dtype, kept = scale_dtype(module), module.scales.dtype
        state = packed(unpacked(module), module)
        for name in ("qweight", "qzeros", "scales"):
            module._buffers[name] = state.pop(name)
        set_marks(module, state)
        if module.bias is not None:
            module._buffers["bias"] = module.bias.to(dtype)
        if torch.finfo(kept).eps > torch.finfo(dtype).eps:
            notice = _ROUNDED
    vars(module).pop("dequantize_weight", None)  # it is bound to the layer that it was compiled for, also in copies
    if "linear_mode" in vars(module):
        module.linear_mode = "train"
        if "Avx512" in type(module).__name__:  # they refuse training, but what they compute in this mode is right
            module.train = partial(nn.Module.train, module)
    return notice
