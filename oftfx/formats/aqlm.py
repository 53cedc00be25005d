"""AQLM: groups of weights as sums of codebook entries (``aqlm.QuantizedLinear``), of any number and size of codebooks.

Storage: ``codes`` ``(out / og, in / ig, C)``, int8 up to 8 bits and int16 above, two's complement of indices into
``codebooks (C, 2^bits, og, ig)``; ``scales (out / og, 1, 1, 1)``. A tile of ``og x ig`` weights is
``scale * sum_c codebooks[c, codes[..., c]]``, summed and multiplied in the dtype of the codebooks.

With codebooks of 256 entries the first forward on a CPU turns the codes to ``(in / ig, out / og, C)`` in place, as no
checkpoint holds them. The kernel that reads them so lets threads race for the same sums and has no backward.
`dequantize` reads both orders and `prepare` restores the first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import MissingExtraError
from oftfx.formats.base import Geometry, WeightFormat, WeightState
from oftfx.formats.by_name import class_named
from oftfx.grids.codebook_compensate import compensated_sums
from oftfx.grids.codebook_fit import fitted
from oftfx.grids.codebooks import Additive

_PARAMETERS = ("codes", "codebooks", "scales")
_OPERATORS = ("gemv_op", "gemm_op", "use_gemv_rule")  # made in the first forward, for the order that codes have since
_TURNED_SIZE = 256  # entries of codebooks whose codes the runtime turns


class Aqlm(WeightFormat):
    """``QuantizedLinear`` of the package aqlm, recognised by class name."""

    name = "aqlm"

    def matches(self, module: nn.Module) -> bool:
        """By the names of class and tensors; the package makes these layers for quantized weights only."""
        named = class_named(module, "aqlm.", "QuantizedLinear") is not None
        return named and all(module._parameters.get(name) is not None for name in _PARAMETERS)

    def geometry(self, module: nn.Module) -> Geometry:
        """From the tensors; the number of codes is the same in both orders."""
        rows, columns, _, high, wide = _sizes(module)
        return Geometry("linear", columns * wide, rows * high)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of the codebooks."""
        return _tensor(module, "codebooks").dtype

    def dequantize(self, module: nn.Module) -> Tensor:
        """``scale * sum_c codebooks[c, code_c]``, tile by tile."""
        return self.sums(module).weight()

    def sums(self, module: nn.Module) -> Additive:
        """What is stored, whatever the order of the codes."""
        codebooks = _tensor(module, "codebooks")
        # Two's complement: the low bits are the index.
        codes = _codes(module).to(torch.int32) & (codebooks.shape[1] - 1)
        scales = _tensor(module, "scales").float().flatten()
        return Additive(codes, codebooks.float(), scales, codebooks.dtype)

    @torch.no_grad()
    def requantize(self, weight: Tensor, like: nn.Module) -> WeightState:
        """Codebooks, codes and scales fitted anew, or the old codebooks where those come nearer.

        A weight that has not changed keeps every byte.
        """
        old = self.sums(like)
        if torch.equal(weight, old.weight()):
            return _unchanged(like)
        return _packed(fitted(weight.float(), tuple(old.codebooks.shape), old.dtype, old), like)

    @torch.no_grad()
    def calibrate(self, weight: Tensor, like: nn.Module, moments: Tensor) -> WeightState:
        """Fitted as by `requantize`, then with the error spread; see `oftfx.grids.codebook_compensate`."""
        old = self.sums(like)
        if torch.equal(weight, old.weight()):
            return _unchanged(like)
        weight = weight.float()
        start = fitted(weight, tuple(old.codebooks.shape), old.dtype, old)
        return _packed(compensated_sums(weight, start, moments), like)

    def native_fault(self, module: nn.Module) -> str | None:
        """Codebooks of 256 entries on a CPU; codes that were made in inference mode."""
        codes, codebooks = _tensor(module, "codes"), _tensor(module, "codebooks")
        if codes.is_inference():
            return "its codes are inference tensors, which autograd cannot keep for a backward"
        if codes.device.type != "cpu" or codebooks.shape[1] != _TURNED_SIZE:
            return None
        if codebooks.shape[2] > 1:
            return "on a CPU its forward turns the codes and then cannot read them"
        return "its CPU kernel lets threads race for the same sums and has no backward"

    def fault_depends_on_device(self, module: nn.Module) -> bool:
        """Codebooks of 256 entries have a kernel of their own on a CPU."""
        return _tensor(module, "codebooks").shape[1] == _TURNED_SIZE

    def read(self, module: nn.Module) -> WeightState:
        """The Parameters, and the operators that know in which order the codes are."""
        state: dict[str, Any] = {name: module._parameters[name] for name in _PARAMETERS}
        return state | {name: getattr(module, name) for name in _OPERATORS}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace them; without operators the next forward makes new ones."""
        for name, value in state.items():
            setattr(module, name, value)

    def nbytes(self, module: nn.Module) -> int:
        """Codes, codebooks and scales."""
        return sum(t.numel() * t.element_size() for t in (_tensor(module, name) for name in _PARAMETERS))

    def own(self, module: nn.Module) -> None:
        """A Parameter of its own over the same codes: the runtime turns what the Parameter holds."""
        codes: Any = module.codes
        module.codes = nn.Parameter(codes.data, requires_grad=False)

    def hold_still(self, module: nn.Module) -> Callable[[], None]:
        """Let the forward turn the codes of a Parameter that is thrown away."""
        state = self.read(module)
        self.own(module)
        return lambda: self.write(module, state)

    def prepare(self, module: nn.Module) -> str | None:
        """Turn codes back; nothing is lost by that."""
        if _turned(module):
            self.write(module, _unchanged(module))
        return None

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Two codebooks of 16 entries for pairs of weights."""
        linear = nn.Linear(in_features, out_features, bias=bias)
        return make_aqlm(linear, num_codebooks=2, nbits=4, in_group_size=2)


def make_aqlm(
    linear: nn.Linear, *, num_codebooks: int = 2, nbits: int = 8, in_group_size: int = 8, out_group_size: int = 1
) -> nn.Module:
    """Quantize a float Linear into an ``aqlm.QuantizedLinear`` of its dtype; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        num_codebooks: entries that are summed for a group.
        nbits: of a code; codebooks have ``2 ** nbits`` entries.
        in_group_size: columns of a group; divides ``in``.
        out_group_size: rows of a group; divides ``out``.
    """
    try:
        from aqlm import QuantizedLinear
    except ImportError as error:
        raise MissingExtraError("aqlm", "aqlm", "Making an AQLM layer") from error
    weight, bias = linear.weight.detach(), linear.bias
    layer = QuantizedLinear(
        linear.in_features,
        linear.out_features,
        in_group_size,
        out_group_size,
        num_codebooks,
        nbits,
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    shape = (num_codebooks, 2**nbits, out_group_size, in_group_size)
    Aqlm().write(layer, _packed(fitted(weight.float(), shape, weight.dtype), layer))
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer.requires_grad_(False)


def _tensor(module: nn.Module, name: str) -> Tensor:
    value: Any = module._parameters[name]
    return value.data


def _sizes(module: nn.Module) -> tuple[int, int, int, int, int]:
    """Rows and columns of groups, codes of each, and the rows and columns of one."""
    count, _, high, wide = _tensor(module, "codebooks").shape
    rows = _tensor(module, "scales").shape[0]
    return rows, _tensor(module, "codes").numel() // (rows * count), count, high, wide


def _turned(module: nn.Module) -> bool:
    """Whether the codes are ``(columns, rows, C)``.

    Where there are as many rows as columns of groups the shape does not say so, but the operators do: the runtime makes
    them right after it turned the codes, and its CPU kernel reads no other order.
    """
    rows, columns, *_ = _sizes(module)
    if rows != columns:
        return _tensor(module, "codes").shape[0] == columns
    operator: Any = module.gemv_op
    if operator is None or _tensor(module, "codebooks").shape[1] != _TURNED_SIZE:
        return False
    if _sizes(module)[3] > 1:  # one kernel for both devices; only a CPU turns
        return _tensor(module, "codes").device.type == "cpu"
    kernel = inspect.getclosurevars(operator.forward).nonlocals.get("forward_pass_kernel")
    return "numba" in getattr(kernel, "__module__", "")  # it ran on a CPU, wherever the layer is now


def _codes(module: nn.Module) -> Tensor:
    """``(rows, columns, C)`` as stored; may be a view."""
    codes = _tensor(module, "codes")
    return codes.transpose(0, 1) if _turned(module) else codes


def _unchanged(module: nn.Module) -> WeightState:
    """The same weight in tensors of its own, codes in the order of a checkpoint."""
    tensors = {"codes": _codes(module), **{name: _tensor(module, name) for name in ("codebooks", "scales")}}
    return _state({name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, module)


def _packed(found: Additive, like: nn.Module) -> WeightState:
    """As ``like`` stores its own; ``like`` is not changed."""
    size = found.codebooks.shape[1]
    codes = torch.where(found.codes < size // 2, found.codes, found.codes - size)
    tensors = {"codes": codes, "codebooks": found.codebooks, "scales": found.scales.view(-1, 1, 1, 1)}
    # Kernels read them as C-contiguous.
    kept = {name: t.to(_tensor(like, name).dtype, copy=True).contiguous() for name, t in tensors.items()}
    return _state(kept, like)


def _state(tensors: dict[str, Tensor], like: nn.Module) -> WeightState:
    state: dict[str, Any] = dict.fromkeys(_OPERATORS)
    for name, tensor in tensors.items():
        state[name] = nn.Parameter(tensor, requires_grad=like._parameters[name].requires_grad)  # type: ignore[union-attr]
    return state
