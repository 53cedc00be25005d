"""GPTQ: 2 to 8 bits with a scale and a zero point by group, as gptqmodel and auto-gptq keep it in memory.

``W[n, k] = (code[n, k] - zero[g_idx[k], n]) * scales[g_idx[k], n]``, multiplied in the dtype of the scales.

Storage: ``qweight`` int32 ``(ceil(in * bits / 32), out)``, a bit stream along the input; ``qzeros`` int32
``(groups, ceil(out * bits / 32))``, along the output; ``scales (groups, out)``; ``g_idx (in,)``, the group of each
column. 5, 6 and 7 bits, and 3 in the ``gptq_p`` variant, lie in bit planes instead of a stream.

**Which zero is stored.** Files of version 1 hold ``zero - 1``, of version 2 ``zero``, and no flag of a layer can be
relied on. What counts is what a class's own forward does with the stored number, and each does one thing only:
gptqmodel's kernels take it as it is (loaders convert files of version 1 for them), auto-gptq's add one.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState
from oftfx.formats.by_name import class_named
from oftfx.formats.packing import gptqmodel_cpu as cpu
from oftfx.formats.packing.packed_words import PackedWords
from oftfx.formats.packing.words import from_planes, from_stream, to_planes, to_stream
from oftfx.formats.packing.zero_points import Stored, grid_of
from oftfx.grids import Codes, Grid

_GPTQMODEL = {
    "TorchLinear": "torch",
    "TorchAtenLinear": "torch_aten_kernel",
    "TorchCpuAvx512Linear": "torch_cpu_avx512",
    "TritonV2Linear": "tritonv2",
}
"""Kernels that keep the file's buffers, or that can be read after they have repacked them."""
_AUTO_GPTQ = ("qlinear_cuda", "qlinear_cuda_old")
_PACKAGES = ("gptqmodel.nn_modules.qlinear.", "auto_gptq.nn_modules.qlinear.")
_LEAST_ZERO = 1
"""A zero of 0 cannot be told from one of ``2**bits`` in a file of version 1, and kernels differ in what they read."""


class Gptq(PackedWords):
    """Linear layers of gptqmodel and auto-gptq, recognised by the package's class that a layer is made of."""

    name = "gptq"
    counted = ("qweight", "qzeros", "scales", "g_idx")

    def matches(self, module: nn.Module) -> bool:
        """A known kernel with packed words, without an adapter or input rotation of gptqmodel's own."""
        words = module._buffers.get("qweight")
        known = _is_gptqmodel(module) or _auto_gptq(module) is not None
        return known and words is not None and (words.dtype == torch.int32 or cpu.is_repacked(module)) and _bare(module)

    def geometry(self, module: nn.Module) -> Geometry:
        """From the layer's attributes; the words may be padded."""
        out_features, in_features = _shape(module)
        return Geometry("linear", in_features, out_features)

    def rows(self, module: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """By ``g_idx`` itself, which need not cut the columns into equal groups."""
        yield from _stored(module).rows(_groups(module))

    def grid(self, module: nn.Module) -> Grid:
        """Groups of columns in the order of ``g_idx``; one zero for all where they are all in the middle."""
        stored, groups = _stored(module), _groups(module)
        return _grid(module, groups, symmetric=stored.is_symmetric(_bits(module)))

    def codes(self, module: nn.Module) -> Codes:
        """Unpacked."""
        stored = _stored(module)
        return stored.coded(symmetric=stored.is_symmetric(_bits(module)))

    def bits(self, module: nn.Module) -> int:
        """As the layer says."""
        return _bits(module)

    def words(self, stored: Stored, like: nn.Module) -> dict[str, Any]:
        """A bit stream, or bit planes; zeros as the layer's class reads them."""
        return _packed(stored, like)

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace all of it, and forget zeros that were unpacked."""
        super().write(module, state)
        _forget(module)

    def own(self, module: nn.Module) -> None:
        """No compiled function of the original: it would read the original's buffers."""
        vars(module).pop("dequantize_weight", None)
        _forget(module)

    def native_fault(self, module: nn.Module) -> str | None:
        """auto-gptq's own CUDA kernels, and a CPU kernel that has repacked."""
        if cpu.is_repacked(module):
            return "it has repacked its weight for inference and gives no gradients"
        if module.qweight.is_cuda and getattr(module, "autogptq_cuda_available", False):
            return "auto-gptq's CUDA kernels give no gradients"
        return None

    def fault_depends_on_device(self, module: nn.Module) -> bool:
        """auto-gptq takes its CUDA kernels, where there are any, once the layer is on a GPU."""
        return bool(getattr(module, "autogptq_cuda_available", False))

    def is_symmetric(self, module: nn.Module) -> bool:
        """Whether every zero is in the middle, by the zeros: loaders get the layer's own ``sym`` wrong.

        optimum 2.3.0 passes ``desc_act, sym`` by position where gptqmodel 7.7.0 takes ``sym, desc_act``.
        """
        return _stored(module).is_symmetric(_bits(module))

    def has_order(self, module: nn.Module) -> bool:
        """Whether the columns of a group are not neighbours."""
        groups = _groups(module)
        return not torch.equal(groups, torch.arange(len(groups), device=groups.device) // module.group_size)

    def version_1(self, module: nn.Module) -> Tensor | None:
        """``qzeros`` as files of version 1 hold them; None where a zero is 0, which they cannot hold.

        Only for layers that take the stored number as it is.
        """
        zeros = _stored(module).zeros
        if bool((zeros == 0).any()):
            return None
        return _words_of(zeros - 1, module, less=1)

    def forward_is_right(self, module: nn.Module) -> bool:
        """Of auto-gptq's kernels on a GPU."""
        return _auto_gptq(module) is not None and bool(module.qweight.is_cuda)  # type: ignore[operator]

    def adds_one(self, module: nn.Module) -> bool:
        """Whether the layer's forward adds one to what is stored as zero, as for files of version 1."""
        return _auto_gptq(module) is not None

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Four bits, groups of 32 in act-order, float32 scales."""
        return make_gptq(nn.Linear(in_features, out_features, bias=bias), desc_act=True).float()


def make_gptq(
    linear: nn.Linear,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = False,
    desc_act: bool = False,
    kernel: str = "TorchLinear",
    **kwargs: Any,
) -> nn.Module:
    """Round a float Linear into a layer of gptqmodel, float16 scales and bias; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        bits: 2 to 8; the CPU kernels have 4 only.
        group_size: columns of a group, -1 for all.
        sym: one zero for all.
        desc_act: put the columns into groups at random, as act-order does by the size of their inputs.
        kernel: ``"TorchLinear"``, ``"TorchAtenLinear"``, ``"TorchCpuAvx512Linear"`` or ``"TritonV2Linear"``.
        **kwargs: further arguments of the class, such as ``format``.
    """
    try:
        module = import_module(f"gptqmodel.nn_modules.qlinear.{_GPTQMODEL[kernel]}")
    except ImportError as error:
        raise MissingExtraError("gptqmodel", "gptq", "Making a GPTQ layer") from error
    layer: Any = getattr(module, kernel)(
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        in_features=linear.in_features,
        out_features=linear.out_features,
        bias=linear.bias is not None,
        register_buffers=True,
        **kwargs,
    )
    if desc_act:
        layer.g_idx = layer.g_idx[torch.randperm(linear.in_features)]
    if linear.bias is not None:
        layer.bias = linear.bias.detach().to(layer.bias.dtype)
    grid = _grid(layer, _groups(layer), symmetric=sym)
    coded = grid.nearest(linear.weight.detach().float())
    fill = Stored.of(coded, bits, layer.scales.dtype)
    for name in ("qweight", "qzeros", "scales"):
        setattr(layer, name, _packed(fill, layer)[name])
    layer.optimized = True  # else post_init compiles its dequantization, for ten seconds
    layer.post_init()
    return layer


def _package_class(module: nn.Module) -> type | None:
    return next((c for p in _PACKAGES if (c := class_named(module, p)) is not None), None)


def _is_gptqmodel(module: nn.Module) -> bool:
    found = _package_class(module)
    return found is not None and found.__module__.startswith("gptqmodel.") and found.__name__ in _GPTQMODEL


def _auto_gptq(module: nn.Module) -> str | None:
    """Which of auto-gptq's kernels."""
    found = _package_class(module)
    file = "" if found is None else found.__module__.rpartition(".")[2]
    return file if file in _AUTO_GPTQ else None


def _bare(module: nn.Module) -> bool:
    return all(getattr(module, n, None) is None for n in ("adapter", "had_K"))


def _bits(module: nn.Module) -> int:
    return module.bits  # type: ignore[return-value]


def _shape(module: Any) -> tuple[int, int]:
    if _auto_gptq(module):
        return module.outfeatures, module.infeatures
    return module.out_features, module.in_features


def _groups(module: Any) -> Tensor:
    """The group of each column, int64 ``(in,)``; some packers count the last one as -1."""
    groups: Tensor = module.g_idx.long()
    if _auto_gptq(module) == "qlinear_cuda_old":  # has no act-order and does not look at g_idx
        return torch.arange(len(groups), device=groups.device) // module.group_size
    return groups % len(module.scales)


def _grid(module: Any, groups: Tensor, *, symmetric: bool) -> Grid:
    shape, size = _shape(module), module.group_size
    even = torch.arange(shape[1], device=groups.device) // size
    order = None if torch.equal(groups, even) else torch.argsort(groups, stable=True)
    if order is not None and not torch.equal(groups[order], even):
        raise FormatError(
            f"{type(module).__name__}({shape[1]}, {shape[0]}): its g_idx does not put {size} columns into each group, "
            "so it cannot be rounded anew; fold with quantized='keep' or 'float'"
        )
    return grid_of(
        shape,
        size,
        module.bits,
        cpu.scale_dtype(module),
        symmetric=symmetric,
        order=order,
        least_zero=_LEAST_ZERO,
    )


def _stored(module: Any) -> Stored:
    if cpu.is_repacked(module):
        return cpu.unpacked(module)
    rows, columns = _shape(module)
    unpack = from_planes if _is_planar(module) else from_stream
    codes = unpack(module.qweight.T, module.bits, columns)
    zeros = _zero_of(unpack(module.qzeros, module.bits, rows), module)
    return Stored(codes, zeros, module.scales)


def _zero_of(stored: Tensor, module: nn.Module) -> Tensor:
    """The zero that the layer's own forward makes of what is stored."""
    kernel = _auto_gptq(module)
    if kernel is None:
        return stored
    wraps = kernel == "qlinear_cuda_old" and _bits(module) != 3
    return (stored + 1) & (2 ** _bits(module) - 1) if wraps else stored + 1


def _packed(stored: Stored, like: Any) -> dict[str, Any]:
    bits = like.bits
    pack = to_planes if _is_planar(like) else to_stream
    kept = stored.zeros if _auto_gptq(like) is None else (stored.zeros - 1) & (2**bits - 1)
    words = {"qweight": pack(stored.codes, bits).T.contiguous(), "qzeros": _words_of(kept, like)}
    return {**words, "scales": stored.scales} | cpu.plain_marks(like)


def _words_of(zeros: Tensor, like: Any, less: int = 0) -> Tensor:
    """Packed zeros ``(groups, out)``; a loader may have counted up the unused end as well, which gets ``less``."""
    rows, bits = zeros.shape[1], like.bits
    pack = to_planes if _is_planar(like) else to_stream
    if rows * bits % 32 and not cpu.is_repacked(like):
        end = from_stream(like.qzeros, bits, like.qzeros.shape[1] * 32 // bits)[:, rows:]
        zeros = torch.cat([zeros, (end - less).clamp(min=0)], 1)
    return pack(zeros, bits)


def _is_planar(module: nn.Module) -> bool:
    return bool(getattr(module, "planar", False))


def _forget(module: nn.Module) -> None:
    """Drop what a layer has cached of its zeros and groups."""
    if (clear := getattr(module, "clear_weight_cache", None)) is not None:
        clear()
