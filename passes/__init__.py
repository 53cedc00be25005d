"""Passes over a `Program`, one a file, each named by its verb; `protocol` says what a pass is."""

from oftfx.passes.find_functional import FindFunctional
from oftfx.passes.find_producers import FindProducers
from oftfx.passes.fold_into_producers import FoldIntoProducers
from oftfx.passes.fold_rotations import FoldRotations
from oftfx.passes.freeze_rotations import FreezeRotations
from oftfx.passes.insert_rotations import InsertRotations
from oftfx.passes.match_rules import MatchRules
from oftfx.passes.measure_coverage import MeasureCoverage
from oftfx.passes.protocol import Change, Pass, PassManager, PassResult
from oftfx.passes.share_inputs import ShareInputs

__all__ = [
    "Change",
    "FindFunctional",
    "FindProducers",
    "FoldIntoProducers",
    "FoldRotations",
    "FreezeRotations",
    "InsertRotations",
    "MatchRules",
    "MeasureCoverage",
    "Pass",
    "PassManager",
    "PassResult",
    "ShareInputs",
]
