"""Capture a model's program as an FX graph: a recorder on fake tensors, with two rungs to fall back on."""

from oftfx.trace.guards import ShapeGuard
from oftfx.trace.record import Recording, record, record_best
from oftfx.trace.recorder import Recorder

__all__ = ["Recorder", "Recording", "ShapeGuard", "record", "record_best"]
