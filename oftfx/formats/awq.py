"""AWQ: 4 bits (2 to 8 in gptqmodel) with a scale and a zero point by group, in the "GEMM" packing.

``W[n, k] = (code[n, k] - zero[k // g, n]) * scales[k // g, n]``, multiplied in the dtype of the scales.

Storage: ``qweight`` int32 ``(in, words)`` and ``qzeros`` int32 ``(in / g, words)``, ``words = ceil(out * bits / 32)``
along the output; ``scales (in / g, out)``. A word of 4-bit codes holds rows 0, 2, 4, 6, 1, 3, 5, 7 of ``W`` from its
lowest bits up; other bits are a plain bit stream.

autoawq's layer has no gradients without a GPU package, gptqmodel's AwqTorchLinear multiplies in float16 whatever it is
given and rounds its own scales to the dtype of each input: both compute by `oftfx.formats.exact` instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import MissingExtraError
from oftfx.formats.base import Geometry
from oftfx.formats.by_name import class_named
from oftfx.formats.packing import gptqmodel_cpu as cpu
from oftfx.formats.packing.packed_words import PackedWords
from oftfx.formats.packing.words import from_interleaved, from_stream, to_interleaved, to_stream
from oftfx.formats.packing.zero_points import Stored, grid_of
from oftfx.grids import Codes, Grid

_GPTQMODEL = "gptqmodel.nn_modules.qlinear."
_KERNELS = {
    "AwqTorchLinear": _GPTQMODEL + "torch_awq",
    "TorchAtenAwqLinear": _GPTQMODEL + "torch_aten_kernel_awq",
    "TorchCpuAvx512AwqLinear": _GPTQMODEL + "torch_cpu_avx512_awq",
    "WQLinear_GEMM": "awq.modules.linear.gemm",
}
"""Classes that keep the file's buffers, or that can be read after they have repacked them."""


class Awq(PackedWords):
    """Linear layers of autoawq and gptqmodel in the GEMM packing, recognised by the package's class."""

    name = "awq"

    def matches(self, module: nn.Module) -> bool:
        """A known class with packed words, without an adapter or input rotation of gptqmodel's own."""
        words = module._buffers.get("qweight")
        if words is None or _kernel(module) is None:
            return False
        bare = all(getattr(module, n, None) is None for n in ("adapter", "had_K"))
        return bare and (words.dtype == torch.int32 or cpu.is_repacked(module))

    def geometry(self, module: nn.Module) -> Geometry:
        """From the layer's attributes."""
        out_features, in_features = _shape(module)
        return Geometry("linear", in_features, out_features)

    def rows(self, module: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """Unpacked once: layers that compute by it do so at every step."""
        stored = _stored(module)
        columns = torch.arange(stored.codes.shape[1], device=stored.codes.device)
        yield from stored.rows(columns // module.group_size)  # type: ignore[operator]

    def grid(self, module: nn.Module) -> Grid:
        """Groups of consecutive columns; one zero for all where they are all in the middle."""
        return _grid(module, symmetric=_stored(module).is_symmetric(_bits(module)))

    def codes(self, module: nn.Module) -> Codes:
        """Unpacked."""
        stored = _stored(module)
        return stored.coded(symmetric=stored.is_symmetric(_bits(module)))

    def bits(self, module: nn.Module) -> int:
        """As the layer says."""
        return _bits(module)

    def words(self, stored: Stored, like: nn.Module) -> dict[str, Any]:
        """Interleaved for 4 bits, else a bit stream."""
        return _packed(stored, like)

    def native_fault(self, module: nn.Module) -> str | None:
        """Of all but gptqmodel's CPU kernels, and of one of these."""
        if cpu.is_repacked(module):
            return "it has repacked its weight for inference and gives no gradients"
        if _kernel(module) == "WQLinear_GEMM":
            return "autoawq gives no gradients in eval mode, and none without a GPU package in training"
        if _kernel(module) == "AwqTorchLinear":
            return "it computes in 16 bits and rounds its scales to the dtype of each input"
        if _kernel(module) == "TorchCpuAvx512AwqLinear" and module.bias is not None:
            return "adding its float16 bias, it returns float32 for an input in bfloat16"
        return None

    def forward_is_right(self, module: nn.Module) -> bool:
        """Of autoawq's kernels on a GPU."""
        return _kernel(module) == "WQLinear_GEMM" and bool(module.qweight.is_cuda)  # type: ignore[operator]

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Groups of 32, float32 scales, in the kernel whose forward multiplies in them."""
        return make_awq(nn.Linear(in_features, out_features, bias=bias), kernel="TorchAtenAwqLinear").float()


def make_awq(
    linear: nn.Linear, *, bits: int = 4, group_size: int = 32, sym: bool = False, kernel: str = "AwqTorchLinear"
) -> nn.Module:
    """Round a float Linear into an AWQ layer, float16 scales and bias; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        bits: 4; ``"AwqTorchLinear"`` has 2 to 8.
        group_size: columns of a group, -1 for all.
        sym: one zero for all.
        kernel: ``"AwqTorchLinear"``, ``"TorchAtenAwqLinear"``, ``"TorchCpuAvx512AwqLinear"`` or ``"WQLinear_GEMM"``.
    """
    package = _KERNELS[kernel].partition(".")[0]
    try:
        cls = getattr(import_module(_KERNELS[kernel]), kernel)
    except ImportError as error:
        raise MissingExtraError({"awq": "autoawq"}.get(package, package), "awq", "Making an AWQ layer") from error
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer: Any
    if package == "awq":
        layer = cls(bits, group_size, *sizes, bias, linear.weight.device)
    else:
        layer = cls(
            bits=bits,
            group_size=group_size,
            sym=sym,
            desc_act=False,
            in_features=sizes[0],
            out_features=sizes[1],
            bias=bias,
            register_buffers=True,
        )
    if bias:
        layer.bias = linear.bias.detach().to(layer.bias.dtype)
    coded = _grid(layer, symmetric=sym).nearest(linear.weight.detach().float())
    state = _packed(Stored.of(coded, bits, layer.scales.dtype), layer)
    for name in ("qweight", "qzeros", "scales"):
        setattr(layer, name, state[name])
    if package != "awq":
        layer.post_init()
    return layer


def _kernel(module: nn.Module) -> str | None:
    """The package's class that a layer is made of, or None."""
    found = class_named(module, _GPTQMODEL) or class_named(module, "awq.modules.linear.gemm")
    return found.__name__ if found is not None and _KERNELS.get(found.__name__) == found.__module__ else None


def _bits(module: nn.Module) -> int:
    return module.w_bit if _kernel(module) == "WQLinear_GEMM" else module.bits  # type: ignore[return-value]


def _shape(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features


def _grid(module: Any, *, symmetric: bool) -> Grid:
    return grid_of(_shape(module), module.group_size, _bits(module), cpu.scale_dtype(module), symmetric=symmetric)


def _stored(module: Any) -> Stored:
    if cpu.is_repacked(module):
        return cpu.unpacked(module)
    bits, rows = _bits(module), module.out_features

    def unpack(words: Tensor) -> Tensor:
        return from_interleaved(words) if bits == 4 else from_stream(words, bits, rows)

    return Stored(unpack(module.qweight).T.contiguous(), unpack(module.qzeros), module.scales)


def _packed(stored: Stored, like: nn.Module) -> dict[str, Any]:
    bits = _bits(like)

    def pack(codes: Tensor) -> Tensor:
        return to_interleaved(codes) if bits == 4 else to_stream(codes, bits)

    words = {"qweight": pack(stored.codes.T), "qzeros": pack(stored.zeros), "scales": stored.scales}
    return words | cpu.plain_marks(like)
