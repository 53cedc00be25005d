"""Intel neural-compressor, float8 that is multiplied as bfloat16 (``PatchedLinear`` in QDQ mode).

Storage: ``weight`` float8 ``(in, out)``, transposed, and ``dequant_weights.scale``: a python float, which no state_dict
holds, or one bfloat16 an output, which is a Parameter. ``W^T = bfloat16(weight * scale)``.

The forward rounds its input to float8 under a scale that was calibrated (2.5 % of the output), for an input that is
not rotated; and it passes gradients through the same casts unscaled, so that all below 0.01 vanish.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError, MissingExtraError
from oftfx.formats.base import Geometry, WeightState, parameter_of
from oftfx.formats.by_name import class_named
from oftfx.formats.dense import FLOATS
from oftfx.formats.packing.float8_codes import FLOAT8, from_bytes, power_of_two, to_bytes
from oftfx.formats.scalar import ScalarFormat
from oftfx.grids import Codes, Float8, Grid, Partition

_BACKOFF = 0.5  # what the package leaves free above the largest weight: some devices' float8 ends earlier


class IncFp8(ScalarFormat):
    """``PatchedLinear`` with ``dequant_weights``, recognised by class name and dtype, even after a cast."""

    name = "inc_fp8"

    def matches(self, module: nn.Module) -> bool:
        """Converted; one that still observes its inputs has a float weight the other way round, and is not."""
        named = class_named(module, "neural_compressor", "PatchedLinear") is not None
        weight = module._parameters.get("weight")
        converted = named and "dequant_weights" in module._modules
        return converted and weight is not None and weight.dim() == 2 and weight.dtype in (*FLOAT8, *FLOATS)

    def geometry(self, module: nn.Module) -> Geometry:
        """From the weight, which is transposed."""
        in_features, out_features = _weight(module).shape
        return Geometry("linear", in_features, out_features)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype the layer computes in."""
        return module.hp_dtype  # type: ignore[return-value]

    def grid(self, module: nn.Module) -> Grid:
        """One scale, or one a row; powers of two where all are."""
        layer: Any = module
        out_features, in_features = _weight(module).shape[::-1]
        scale = _scales(layer)
        if scale.numel() not in (1, out_features):
            raise FormatError(
                f"PatchedLinear({in_features}, {out_features}) has {scale.numel()} scales; known: 1, or one an output"
            )
        kept = layer.hp_dtype
        levels = Float8(layer.lp_dtype, torch.finfo(layer.lp_dtype).max * _BACKOFF)
        powers = torch.equal(power_of_two(scale.abs()), scale)
        return Grid(
            Partition.tiles((out_features, in_features), (out_features if scale.numel() == 1 else 1, in_features)),
            levels,
            rounded=kept,
            round_scale=power_of_two if powers else lambda s: s.to(kept).float(),
        )

    def codes(self, module: nn.Module) -> Codes:
        """The bytes, transposed back."""
        layer: Any = module
        return Codes(to_bytes(layer.weight.T, layer.lp_dtype), _scales(layer))

    def pack(self, coded: Codes, like: nn.Module) -> WeightState:
        """Weight and scale as ``like`` has them."""
        layer: Any = like
        weight, scale = layer.weight, layer.dequant_weights.scale
        new: Any = float(coded.scale[0])
        if isinstance(scale, Tensor):
            kept = coded.scale.reshape(scale.shape).to(scale.dtype)
            new = nn.Parameter(kept, requires_grad=scale.requires_grad)
        turned = from_bytes(coded.codes.T, layer.lp_dtype, weight)
        return {"weight": nn.Parameter(turned, requires_grad=weight.requires_grad), "scale": new}

    def native_fault(self, module: nn.Module) -> str | None:  # noqa: ARG002
        """Always."""
        return "neural-compressor rounds inputs and gradients of this layer to float8, and small gradients to zero"

    def read(self, module: nn.Module) -> WeightState:
        """Weight and scale."""
        layer: Any = module
        return {"weight": layer.weight, "scale": layer.dequant_weights.scale}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Replace both."""
        layer: Any = module
        layer._parameters["weight"] = state["weight"]
        layer.dequant_weights.scale = state["scale"]

    def nbytes(self, module: nn.Module) -> int:
        """Codes and scales; a python float counts as float32."""
        weight, scale = _weight(module), module.dequant_weights.scale  # type: ignore[union-attr]
        size = scale.numel() * scale.element_size() if isinstance(scale, Tensor) else 4
        return weight.numel() * weight.element_size() + size

    def make_tiny(self, in_features: int, out_features: int, *, bias: bool = True) -> nn.Module:
        """One scale for all, calibrated on normal inputs."""
        return make_patched_linear(nn.Linear(in_features, out_features, bias=bias))


def make_patched_linear(
    linear: nn.Linear, *, kind: str = "E4M3", scale_method: str = "maxabs_arbitrary", inputs: Tensor | None = None
) -> nn.Module:
    """Quantize a float Linear into a ``PatchedLinear``; ``linear`` is not changed.

    Args:
        linear: weight ``(out, in)``.
        kind: ``"E4M3"`` or ``"E5M2"``.
        scale_method: of the package, which has few for a CPU: ``"maxabs_arbitrary"``, ``"maxabs_pow2"``,
            ``"unit_scale"``, ``"act_maxabs_pow2_weights_pcs_maxabs_pow2"`` (one scale an output).
        inputs: what activations are calibrated with, ``(rows, in)``; normal ones without it.
    """
    try:
        from neural_compressor.torch.quantization import FP8Config, convert, finalize_calibration, prepare
    except ImportError as error:
        raise MissingExtraError("neural-compressor", "inc", "Making a float8 layer") from error
    source = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, dtype=linear.weight.dtype)
    source.load_state_dict(linear.state_dict())
    if inputs is None:
        inputs = torch.randn(16, linear.in_features)
    with tempfile.TemporaryDirectory() as folder:
        config = FP8Config(
            fp8_config=kind, use_qdq=True, scale_method=scale_method, dump_stats_path=f"{folder}/statistics"
        )
        model = prepare(nn.Sequential(source), config)
        model(inputs.to(linear.weight.dtype))
        finalize_calibration(model)
        return convert(model)[0].requires_grad_(False)


def _weight(module: nn.Module) -> Tensor:
    return parameter_of(module, "weight")


def _scales(layer: Any) -> Tensor:
    """Float32 ``(1,)`` or ``(out,)``."""
    scale = layer.dequant_weights.scale
    return torch.as_tensor(scale, dtype=torch.float32, device=layer.weight.device).detach().reshape(-1).clone()
