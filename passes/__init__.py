"""Passes over a `Program`, one a file, each named by its verb; `protocol` says what a pass is."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oftfx.passes.check_readers import CheckReaders
    from oftfx.passes.find_functional import FindFunctional
    from oftfx.passes.find_producers import FindProducers
    from oftfx.passes.fold_into_producers import FoldIntoProducers
    from oftfx.passes.fold_rotations import FoldRotations
    from oftfx.passes.freeze_rotations import FreezeRotations
    from oftfx.passes.insert_rotations import InsertRotations
    from oftfx.passes.match_rules import MatchRules
    from oftfx.passes.measure_coverage import MeasureCoverage
    from oftfx.passes.protocol import Change, Pass, PassManager, PassResult
    from oftfx.passes.quantized.calibrate import Calibrate
    from oftfx.passes.quantized.dequantize import Dequantize
    from oftfx.passes.quantized.from_reference import FromReference
    from oftfx.passes.quantized.keep import Keep
    from oftfx.passes.quantized.requantize import Requantize
    from oftfx.passes.share_inputs import ShareInputs
    from oftfx.planning.program import Program

_HOME = {
    **dict.fromkeys(("Change", "Pass", "PassManager", "PassResult"), "oftfx.passes.protocol"),
    "Program": "oftfx.planning.program",
    "CheckReaders": "oftfx.passes.check_readers",
    "FindFunctional": "oftfx.passes.find_functional",
    "FindProducers": "oftfx.passes.find_producers",
    "FoldIntoProducers": "oftfx.passes.fold_into_producers",
    "FoldRotations": "oftfx.passes.fold_rotations",
    "FreezeRotations": "oftfx.passes.freeze_rotations",
    "InsertRotations": "oftfx.passes.insert_rotations",
    "MatchRules": "oftfx.passes.match_rules",
    "MeasureCoverage": "oftfx.passes.measure_coverage",
    "ShareInputs": "oftfx.passes.share_inputs",
    "Calibrate": "oftfx.passes.quantized.calibrate",
    "Dequantize": "oftfx.passes.quantized.dequantize",
    "FromReference": "oftfx.passes.quantized.from_reference",
    "Keep": "oftfx.passes.quantized.keep",
    "Requantize": "oftfx.passes.quantized.requantize",
}

__all__ = [
    "Calibrate",
    "Change",
    "CheckReaders",
    "Dequantize",
    "FindFunctional",
    "FindProducers",
    "FoldIntoProducers",
    "FoldRotations",
    "FreezeRotations",
    "FromReference",
    "InsertRotations",
    "Keep",
    "MatchRules",
    "MeasureCoverage",
    "Pass",
    "PassManager",
    "PassResult",
    "Program",
    "Requantize",
    "ShareInputs",
]


def __getattr__(name: str) -> Any:
    """Loaded when first used, so that one pass does not load all the others."""
    if name not in _HOME:
        raise AttributeError(f"module 'oftfx.passes' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
