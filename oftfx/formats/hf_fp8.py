"""Float8 in blocks, as DeepSeek's and Qwen's checkpoints have it: ``FP8Linear`` of transformers.

Storage: ``weight`` float8_e4m3fn ``(out, in)`` and ``weight_scale_inv``, which in spite of its name is multiplied with:
one a block of ``block_size`` (128 x 128; those at the edges may be smaller), float32 or a power of two
(float8_e8m0fnu), or one for all. ``W = weight * weight_scale_inv``.

The layer is an ``nn.Linear``, and one that was cast (``model.float()``) multiplies with its codes and forgets the
scales, without a word. There is no kernel for a CPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState, parameter_of
from oftfx.formats.by_name import class_named
from oftfx.formats.dense import FLOATS
from oftfx.formats.packing.float8_codes import from_bytes, power_of_two, to_bytes
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Float8, Grid, Partition

_CODES = torch.float8_e4m3fn


class HfFp8(ScalarFormat):
    """``FP8Linear``, recognised by class name, its scales and the weight's dtype, even after a cast."""

    name = "hf_fp8"

    def matches(self, module: nn.Module) -> bool:
        """Float8, or floats beside scales; not 4-bit weights (int8), nor grouped layers, which read another input."""
        single, grouped = (class_named(module, "finegrained_fp8", f"FP8{n}Linear") for n in ("", "Grouped"))
        if single is None or grouped is not None:
            return False
        weight = module._parameters.get("weight")
        scaled = module._parameters.get("weight_scale_inv") is not None
        return weight is not None and scaled and weight.dtype in (_CODES, *FLOATS)

    def geometry(self, module: nn.Module) -> Geometry:
        """From the weight."""
        out_features, in_features = _weight(module).shape
        return Geometry("linear", in_features, out_features)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of the bias; bfloat16, in which such models are made, without one."""
        bias = module._parameters.get("bias")
        return torch.bfloat16 if bias is None else bias.dtype

    def grid(self, module: nn.Module) -> Grid:
        """Tiles of float8."""
        shape, scale = tuple(_weight(module).shape), _scale(module)
        exponents = scale.dtype == torch.float8_e8m0fnu
        kept = scale.dtype
        return Grid(
            Partition.tiles(shape, _block(module)),
            Float8(_CODES),
            round_scale=power_of_two if exponents else lambda s: s.to(kept).float(),
        )

    def codes(self, module: nn.Module) -> Codes:
        """The bytes."""
        return Codes(to_bytes(_weight(module), _CODES), _scale(module).detach().float().reshape(-1))

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """Two Parameters."""
        weight, scale = _weight(like), _scale(like)
        new_scale = coded.scale.reshape(scale.shape).to(scale.dtype)
        return {
            "weight": nn.Parameter(from_bytes(coded.codes, _CODES, weight), requires_grad=weight.requires_grad),
            "weight_scale_inv": nn.Parameter(new_scale, requires_grad=scale.requires_grad),
        }

    def native_fault(self, module: nn.Module) -> str | None:
        """Anywhere without the kernels."""
        if _weight(module).device.type == "cpu":
            return "transformers has no kernel for float8 blocks on a CPU"
        if find_spec("kernels") is None:
            return "the package `kernels`, with which transformers loads its float8 product, is not installed"
        return None

    def fault_depends_on_device(self, module: nn.Module) -> bool:  # noqa: ARG002
        """Its kernels are for GPUs."""
        return True

    def read(self, module: nn.Module) -> WeightState:
        """Weight and scales."""
        return {name: module._parameters[name] for name in ("weight", "weight_scale_inv")}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace both."""
        module._parameters.update(state)

    def nbytes(self, module: nn.Module) -> int:
        """Codes and scales."""
        return sum(t.numel() * t.element_size() for t in (_weight(module), _scale(module)))

    def prepare(self, module: nn.Module) -> str | None:
        """Undo a cast of the weight, after which the layer ignores its scales."""
        weight, scale = _weight(module), _scale(module)
        if weight.dtype == _CODES:
            return None
        codes = to_bytes(weight, _CODES).view(_CODES)
        module._parameters["weight"] = nn.Parameter(codes, requires_grad=weight.requires_grad)
        notice = f"its float8 codes had been cast to {weight.dtype}, with which the layer ignores their scales; undone"
        if scale.dtype in (torch.float16, torch.bfloat16):
            wide = nn.Parameter(scale.detach().float(), requires_grad=scale.requires_grad)
            module._parameters["weight_scale_inv"] = wide
            notice += f", but for what the scales lost in {scale.dtype}"
        return notice

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """Blocks of 128 x 128, those at the edges smaller where they must."""
        return make_fp8_linear(nn.Linear(in_features, out_features, bias=bias))


def make_fp8_linear(
    linear: nn.Linear, *, block_size: tuple[int, int] | None = (128, 128), scale_fmt: str = "float", **kwargs: Any
) -> nn.Module:
    """Quantize a float Linear into an ``FP8Linear``; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        block_size: rows and columns that share a scale; None: all.
        scale_fmt: ``"float"``, or ``"ue8m0"`` for powers of two.
        **kwargs: further arguments of ``FP8Linear``.
    """
    try:
        from transformers.integrations.finegrained_fp8 import FP8Linear
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "Making a float8 layer") from error
    if scale_fmt != "float":  # older ones know no other
        kwargs["scale_fmt"] = scale_fmt
    layer = FP8Linear(
        linear.in_features, linear.out_features, block_size=block_size, has_bias=linear.bias is not None, **kwargs
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().clone())
    layer.requires_grad_(False)
    known = HfFp8()
    known.write(layer, known.pack(known.grid(layer).fit(linear.weight.detach().float()), layer))
    return layer


def _weight(module: nn.Module) -> Tensor:
    return parameter_of(module, "weight")


def _scale(module: nn.Module) -> Tensor:
    return parameter_of(module, "weight_scale_inv")


def _block(module: Any) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    shape, scales = tuple(module.weight.shape), tuple(module.weight_scale_inv.shape)
    high, wide = module.block_size or shape
    expected = (-(-shape[0] // high), -(-shape[1] // wide)) if module.block_size else scales
    if scales != expected or (not module.block_size and module.weight_scale_inv.numel() != 1):
        raise FormatError(
            f"FP8Linear{shape[::-1]} has scales {scales}, which do not fit its block_size {module.block_size}"
        )
    return high, wide
