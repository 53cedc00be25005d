"""oftfx: put orthogonal fine-tuning rotations into any model, train them, fold them, deploy a plain model.

    model = oftfx.transform(model, {"*.q_proj": oftfx.OFT(32), "*.v_proj": oftfx.OFT(32)})
    ...                                  # train with any loop
    result = oftfx.fold(model)           # the rotations go into the weights
    oftfx.export_onnx(result.model, "model.onnx", example_inputs)

Public names are loaded when they are first used; importing the package loads nothing but the standard library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from oftfx.version import __version__

_HOME = {
    "OFT": "oftfx.rotation.spec",
    "Rule": "oftfx.planning.rules",
    "Plan": "oftfx.planning.plans",
    "Site": "oftfx.model.site",
    "Program": "oftfx.planning.program",
    "Rotation": "oftfx.rotation.module",
    "WeightFormat": "oftfx.formats",
    "register_format": "oftfx.formats",
    "plan": "oftfx.surgery",
    "transform": "oftfx.surgery",
    "graph": "oftfx.trace.graphs",
    "add_adapter": "oftfx.surgery",
    "set_adapter": "oftfx.adapter.switch",
    "remove_adapter": "oftfx.adapter.switch",
    "adapters": "oftfx.adapter.switch",
    "active_adapters": "oftfx.adapter.switch",
    "disable_adapters": "oftfx.adapter.switch",
    "refresh": "oftfx.adapter.switch",
    "adapter_parameters": "oftfx.adapter.switch",
    "adapter_rows": "oftfx.adapter.rows",
    "save_adapter": "oftfx.adapter.save",
    "load_adapter": "oftfx.adapter.load",
    "adapter_callback": "oftfx.training.callback",
    "blend": "oftfx.blending.blend",
    "BlendReport": "oftfx.blending.blend_report",
    "rotation_angles": "oftfx.blending.angles",
    "AngleReport": "oftfx.blending.angles",
    "adapter_distance": "oftfx.blending.distance",
    "DistanceReport": "oftfx.blending.distance",
    "retention": "oftfx.blending.retention",
    "RetentionCurve": "oftfx.blending.retention",
    "to_lora": "oftfx.lora.convert",
    "LoraReport": "oftfx.lora.report",
    "adapter_convention": "oftfx.adapter.conventions.registry",
    "fold": "oftfx.folds",
    "unfold": "oftfx.folds",
    "quantize": "oftfx.quantizing",
    "fold_aware": "oftfx.foldaware",
    "fold_checkpoint": "oftfx.streaming.directory_fold",
    "Budget": "oftfx.folding.policies",
    "save_rotations": "oftfx.adapter.fixed_rotations",
    "load_rotations": "oftfx.adapter.fixed_rotations",
    "load_folded": "oftfx.adapter.folded",
    "FoldResult": "oftfx.folds",
    "FoldReport": "oftfx.folding.report",
    "CompareReport": "oftfx.folding.compare",
    "model_card": "oftfx.adapter.card",
    "export_onnx": "oftfx.onnx.export",
    "export_onnx_adapter": "oftfx.onnx.adapters.file",
    "export_genai": "oftfx.onnx.genai",
    "ExportReport": "oftfx.onnx.report",
    "export_openvino": "oftfx.onnx.openvino",
    "export_gguf": "oftfx.gguf.export",
    "GgufReport": "oftfx.gguf.export",
    "OftfxError": "oftfx.errors",
}

__all__ = [
    "OFT",
    "AngleReport",
    "BlendReport",
    "Budget",
    "CompareReport",
    "DistanceReport",
    "ExportReport",
    "FoldReport",
    "FoldResult",
    "GgufReport",
    "LoraReport",
    "OftfxError",
    "Plan",
    "Program",
    "RetentionCurve",
    "Rotation",
    "Rule",
    "Site",
    "WeightFormat",
    "__version__",
    "active_adapters",
    "adapter_callback",
    "adapter_convention",
    "adapter_distance",
    "adapter_parameters",
    "adapter_rows",
    "adapters",
    "add_adapter",
    "blend",
    "disable_adapters",
    "export_genai",
    "export_gguf",
    "export_onnx",
    "export_onnx_adapter",
    "export_openvino",
    "fold",
    "fold_aware",
    "fold_checkpoint",
    "graph",
    "load_adapter",
    "load_folded",
    "load_rotations",
    "model_card",
    "plan",
    "quantize",
    "refresh",
    "register_format",
    "remove_adapter",
    "retention",
    "rotation_angles",
    "save_adapter",
    "save_rotations",
    "set_adapter",
    "to_lora",
    "transform",
    "unfold",
]
"""Written out, for those who check types: every name of `_HOME`."""

if TYPE_CHECKING:
    from oftfx.adapter.card import model_card
    from oftfx.adapter.conventions.registry import adapter_convention
    from oftfx.adapter.fixed_rotations import load_rotations, save_rotations
    from oftfx.adapter.folded import load_folded
    from oftfx.adapter.load import load_adapter
    from oftfx.adapter.rows import adapter_rows
    from oftfx.adapter.save import save_adapter
    from oftfx.adapter.switch import (
        active_adapters,
        adapter_parameters,
        adapters,
        disable_adapters,
        refresh,
        remove_adapter,
        set_adapter,
    )
    from oftfx.blending.angles import AngleReport, rotation_angles
    from oftfx.blending.blend import blend
    from oftfx.blending.blend_report import BlendReport
    from oftfx.blending.distance import DistanceReport, adapter_distance
    from oftfx.blending.retention import RetentionCurve, retention
    from oftfx.errors import OftfxError
    from oftfx.foldaware import fold_aware
    from oftfx.folding.compare import CompareReport
    from oftfx.folding.policies import Budget
    from oftfx.folding.report import FoldReport
    from oftfx.folds import FoldResult, fold, unfold
    from oftfx.formats.base import WeightFormat
    from oftfx.formats.registry import register_format
    from oftfx.gguf.export import GgufReport, export_gguf
    from oftfx.lora.convert import to_lora
    from oftfx.lora.report import LoraReport
    from oftfx.model.site import Site
    from oftfx.onnx.adapters.file import export_onnx_adapter
    from oftfx.onnx.export import export_onnx
    from oftfx.onnx.genai import export_genai
    from oftfx.onnx.openvino import export_openvino
    from oftfx.onnx.report import ExportReport
    from oftfx.planning.plans import Plan
    from oftfx.planning.program import Program
    from oftfx.planning.rules import Rule
    from oftfx.quantizing import quantize
    from oftfx.rotation.module import Rotation
    from oftfx.rotation.spec import OFT
    from oftfx.streaming.directory_fold import fold_checkpoint
    from oftfx.surgery import add_adapter, plan, transform
    from oftfx.trace.graphs import graph
    from oftfx.training.callback import adapter_callback


def __getattr__(name: str) -> Any:
    if name == "serving":  # a subpackage, and the one that users name
        return import_module("oftfx.serving")
    if name not in _HOME:
        raise AttributeError(f"module 'oftfx' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
