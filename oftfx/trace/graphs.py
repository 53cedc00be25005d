"""The whole program of a model as an executable graph."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn as nn

from oftfx.errors import RuleError, TraceError
from oftfx.placement.find import check_unaware
from oftfx.placement.rows import check_no_rows
from oftfx.trace.foreign import is_bug
from oftfx.trace.graph_module import ProgramGraph
from oftfx.trace.inputs import ExampleInputs
from oftfx.trace.record import record
from oftfx.trace.torch_private import SWITCH


def graph(
    model: nn.Module, example_inputs: ExampleInputs = None, *, on_miss: Literal["error", "eager"] = "error"
) -> ProgramGraph:
    """Record the whole program of a model as an executable graph, active rotations as explicit nodes.

    Sizes of the inputs stay free where the program allows it; a guard, the graph's first node, refuses calls that the
    recording does not stand for. Parameters are the same objects under the same names.

    Args:
        model: any module, transformed or not.
        example_inputs: see `plan`. Sizes 0 and 1 are taken as fixed.
        on_miss: what a call that the guard refuses gets: a clear error, or the answer of the model itself.

    Raises:
        RuleError: another ``on_miss``.
        TraceError: the program depends on data, or cannot be recorded for another reason (which is named).

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> graph = oftfx.graph(model, (torch.randn(5, 6),))
        >>> x = torch.randn(7, 6)
        >>> torch.equal(graph(x), model(x)), graph.get_parameter("0.weight") is model[0].weight
        (True, True)
    """
    if on_miss not in ("error", "eager"):
        raise RuleError(f"on_miss: got {on_miss!r}, expected 'error' or 'eager'")
    check_no_rows(model, "a recording")
    check_unaware(model, "a graph")
    try:
        recording = record(model, example_inputs, dynamic=True, executable=True)
    except TraceError:
        raise
    except Exception as error:
        if is_bug(error):
            raise
        raise TraceError(
            f"{type(model).__name__} cannot be recorded on fake tensors: {type(error).__name__}: {error}. "
            "emit='modules' needs no recording"
        ) from error
    if recording.rung != "graph" or recording.module is None:
        raise TraceError(f"{type(model).__name__} cannot become a graph: {recording.reason}")
    # In the other mode and without gradients, at once; only where something differs it matters what.
    other = record(model, example_inputs, dynamic=True, training=not model.training, gradients=False).graph
    if not _same_program(recording.graph, other):
        guard: Any = recording.module.get_submodule("_guard")
        bare = record(model, example_inputs, dynamic=True, gradients=False).graph
        if not _same_program(recording.graph, bare):
            guard.recorded_gradients = True
        if not _same_program(bare, other):
            guard.recorded_training = model.training
    recording.module.on_miss = on_miss
    return recording.module


def _same_program(a: Any, b: Any) -> bool:
    """Whether two recordings have the same nodes with the same constants; inputs, guard and output aside."""

    def text(graph: Any) -> list[str]:
        skipped = ("placeholder", "output")
        # What switches gradients off and on again inside the model restores what was there; classes make the result.
        nodes = [n for n in graph.nodes if n.op not in skipped and n.target not in ("_guard", SWITCH)]
        nodes = [n for n in nodes if not isinstance(n.target, type)]
        return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in nodes]

    return text(a) == text(b)
