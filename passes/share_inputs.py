"""Find sites that read the same tensor, and let those that ask for it share one rotation."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
import torch.fx as fx
import torch.nn as nn

from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.planning.program import Program
from oftfx.planning.site_plan import SitePlan, TraceInfo
from oftfx.trace.operand import first_operand

# Functions and layers that hand a value on unchanged, as far as a rotation of its last axis goes.
_TRANSPARENT_METHODS = frozenset({"contiguous", "to", "clone", "float", "half", "bfloat16", "double", "type_as"})
_TRANSPARENT_MODULES = (nn.Identity,)


class ShareInputs(Pass):
    """Group planned sites by the value they read, within one parent module.

    Only within one parent: a rotation shared across layers would be evaluated once and used in several checkpointed
    segments, which gradient checkpointing forbids. Sites called more than once have to agree in every call.
    Without a recording every site stands alone, and the plan says so. Sites that keep rotations of their own are
    grouped all the same: they rotate in one product.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import MatchRules, PassManager, Program, ShareInputs
        >>> from oftfx.trace.record import record
        >>> class Pair(torch.nn.Sequential):
        ...     def forward(self, x):
        ...         return self[0](x) + self[1](x)
        >>> model = Pair(torch.nn.Linear(6, 4), torch.nn.Linear(6, 4))
        >>> passes = [MatchRules([oftfx.Rule("*", oftfx.OFT(3, share_input=True))]), ShareInputs()]
        >>> result = PassManager(passes).run(Program.of(model, record(model, (torch.randn(5, 6),))))
        >>> [(site.fqn, site.owner) for site in result.program.planned]
        [('0', '0'), ('1', '0')]
    """

    name = "share_inputs"
    preserves = "exact"
    after = ("match_rules",)

    def run(self, program: Program) -> PassResult:
        """Fill in ``same_input`` and, where the spec has ``share_input``, ``owner``."""
        plan, recording = program.planned, program.recording
        if recording is None:
            return PassResult(program, False)
        inputs = _inputs_by_site(recording.graph, program.index.modules)
        groups: dict[tuple[str, tuple[fx.Node, ...]], list[SitePlan]] = defaultdict(list)
        for entry in plan:
            values = inputs.get(entry.site.module) if entry.placement == "activation" else None
            if values and entry.site.layout.side == "input":
                groups[entry.fqn.rpartition(".")[0], tuple(values)].append(entry)
        info = TraceInfo(
            recording.rung,
            recording.reason,
            len(recording.graph.nodes),
            tuple(e.fqn for e in plan if recording.rung != "tree" and not recording.calls.get(e.site.called)),
        )
        new: dict[str, SitePlan] = {}
        changes = []
        for (_, group_values), group in groups.items():
            for entry in group:
                others = tuple(e.fqn for e in group if e is not entry)
                owner = _owner(entry, group)
                if owner != entry.fqn:
                    changes.append(Change(entry.fqn, f"shares the rotation of {owner}"))
                local = _is_local(entry.fqn, group_values[0])
                new[entry.fqn] = replace(entry, same_input=others, owner=owner, local_input=local)
        changes += [
            Change(e.fqn, "share", f"no recording: {recording.reason}", refused=True)
            for e in plan
            if e.spec.share_input and recording.rung == "tree"
        ]
        entries = tuple(new.get(e.fqn, e) for e in plan)
        result = replace(plan, entries=entries, trace=info)
        return PassResult(program.with_(plan=result), result != program.plan, tuple(changes))


def _is_local(fqn: str, value: fx.Node) -> bool:
    """Whether a value is made inside the layer that a site belongs to: the innermost numbered module of its path."""
    parts = fqn.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    layer = parts[: numbered[-1] + 1] if numbered else []
    maker = str(value.meta.get("module", "")).split(".")
    return value.op != "placeholder" and bool(layer) and maker[: len(layer)] == layer


def _owner(entry: SitePlan, group: list[SitePlan]) -> str:
    """The first site of the group with the same spec and geometry, where the spec asks for sharing."""
    if not entry.spec.share_input:
        return entry.fqn
    same = [e for e in group if e.spec == entry.spec and e.site.in_features == entry.site.in_features]
    return same[0].fqn


def _inputs_by_site(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, list[fx.Node]]:
    """For each called module, the canonical node of its input in each call."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            value = first_operand(node)
            if isinstance(value, fx.Node):
                found[str(node.target)].append(_canonical(value, modules))
    return found


def _canonical(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """Look through what does not change the last axis of a value."""
    while True:
        if (
            (node.op == "call_method" and node.target in _TRANSPARENT_METHODS)
            or (node.op == "call_module" and isinstance(modules.get(str(node.target)), _TRANSPARENT_MODULES))
            or (node.op == "call_function" and node.target is torch.clone)
        ):
            step = first_operand(node)
        else:
            return node
        if not isinstance(step, fx.Node):
            return node
        node = step
