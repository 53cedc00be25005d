"""Find the layer whose output a site's rotation can be pushed into, or say what is in the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import torch
import torch.fx as fx
import torch.nn as nn

from oftfx.errors import RuleError
from oftfx.model.site import Site
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.planning.program import Program
from oftfx.planning.site_plan import Producer, SitePlan
from oftfx.trace.labels import Labels, LostError, name_of, source_of, start, step
from oftfx.trace.operand import first_operand


class FindProducers(Pass):
    """Where a site reads, through data movement and attention weights only, what one linear layer computed.

    Then ``x @ R`` can be made by that layer: ``R^T`` multiplies the rows of its weight and bias, and the site's own
    weight stays bit for bit (`oftfx.fold` with ``into="producer"``). Typical is v_proj -> attention -> o_proj, with the
    block size dividing the head size; of grouped heads those that read the same rows need the same block, which
    ``OFT(into="producer")`` gives them. Everything else that reads rotated rows is found and refused.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import FindProducers, MatchRules, PassManager, Program
        >>> from oftfx.trace.record import record
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
        >>> program = Program.of(model, record(model, (torch.randn(5, 6),)))
        >>> passes = [MatchRules([oftfx.Rule("1", oftfx.OFT(3))]), FindProducers()]
        >>> PassManager(passes).run(program).program.planned["1"].producer
        Producer(fqn='0', starts=(0, 3, 6))
    """

    name = "find_producers"
    preserves = "exact"
    after = ("match_rules", "share_inputs")

    def run(self, program: Program) -> PassResult:
        """Fill in ``producer`` or ``producer_reason`` of every entry.

        Raises:
            RuleError: a spec asks for ``into="producer"`` and that is not possible.
        """
        plan, recording = program.planned, program.recording
        entries, changes, faults = [], list[Change](), []
        search = None
        if recording is not None and recording.rung != "tree":
            search = _Search(recording.graph, program.index.modules, program.sites)
        for entry in plan:
            try:
                if search is None:
                    raise LostError("not recorded")
                producer = search.producer(entry)
                entries.append(_tied(replace(entry, producer=producer), producer))
                changes.append(Change(entry.fqn, f"can be folded into {producer.fqn}"))
            except LostError as error:
                reason = str(error)
                entries.append(replace(entry, producer_reason=reason))
                changes.append(Change(entry.fqn, "fold into producer", reason, refused=True))
                if entry.spec.into == "producer":
                    faults.append(f"{entry.fqn}: cannot be folded into a producer: {reason}")
        if faults:
            more = [f"... and {len(faults) - 5} more"] if len(faults) > 5 else []
            raise RuleError("\n".join([*faults[:5], *more]))
        result = replace(plan, entries=tuple(entries))
        return PassResult(program.with_(plan=result), result != plan, tuple(changes))


def _tied(entry: SitePlan, producer: Producer) -> SitePlan:
    """Blocks that turn the same rows share one row of skew, where the spec asks for it."""
    if entry.spec.into != "producer":
        return entry
    rows = list(dict.fromkeys(producer.starts))
    return replace(entry, tied_blocks=tuple(rows.index(s) for s in producer.starts))


def _turned(entry: SitePlan) -> str:
    """What the rotation of a site turns, in words."""
    side = "weight" if entry.placement == "weight" else entry.site.layout.side
    return f"the {side} of {entry.fqn} ({entry.site.module_class})"


class _Search:
    """Walks a recorded graph backwards from sites to the layers that make what they read."""

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module], sites: tuple[Site, ...]) -> None:
        self.modules = modules
        self.linear = {s.fqn for s in sites if s.is_linear and s.is_layer}
        self.calls: dict[str, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls[str(node.target)].append(node)

    def producer(self, entry: SitePlan) -> Producer:
        """The producer of a site's input and the rows that each block turns.

        Raises:
            LostError: there is none, and why.
        """
        if not entry.site.is_linear or entry.placement != "activation":
            raise LostError(f"only what a linear layer reads can be turned before it, not {_turned(entry)}")
        calls = self.calls[entry.fqn]
        if len(calls) != 1:
            raise LostError(f"{f'called {len(calls)} times' if calls else 'never called'} in the recorded forward")
        path = self._back(calls[0])
        labels = start(path[0])
        for before, node in pairwise(path[:-1]):
            labels = step(node, before, labels)
        starts = _starts(labels, entry)
        self._check_readers(path, {s + i for s in starts for i in range(entry.block_size)})
        return Producer(str(path[0].target), starts)

    def _back(self, call: fx.Node) -> list[fx.Node]:
        """Nodes from the producer's call to the site's."""
        value = first_operand(call)
        path = [call]
        while isinstance(value, fx.Node):
            path.insert(0, value)
            if value.op == "call_module" and str(value.target) in self.linear:
                if len(self.calls[str(value.target)]) != 1:
                    raise LostError(f"{value.target} is called several times")
                return path
            source = source_of(value, self.modules)
            if source is None:
                break
            value = source
        raise LostError(f"{self._said(path[0])} does not commute with a rotation")

    def _said(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{type(self.modules[str(node.target)]).__name__} {node.target}"
        if node.op == "placeholder":
            return f"the model's input {node.target}"
        return f"{name_of(node)} in {node.meta.get('module') or 'the model itself'}"

    def _check_readers(self, path: list[fx.Node], rows: set[int]) -> None:
        """Nothing but the site reads a rotated row: every branch off the path is followed as far as labels go."""
        site, wanted = path[-1], torch.tensor(sorted(rows))
        todo: list[tuple[fx.Node, Labels]] = [(path[0], start(path[0]))]
        while todo:
            node, labels = todo.pop()
            for user in node.users:
                if user is site:
                    continue
                moved = None
                if source_of(user, self.modules) is node:
                    try:
                        moved = step(user, node, labels)
                    except LostError:
                        moved = None
                if moved is not None:
                    todo.append((user, moved))
                elif _sees(labels, wanted):
                    reader = "the model returns" if user.op == "output" else f"{self._said(user)} reads"
                    raise LostError(f"{reader} the same rows of {path[0].target}")


def _sees(labels: Labels, rows: torch.Tensor) -> bool:
    parts = labels.feature if isinstance(labels.feature, (tuple, list)) else (labels.feature,)
    return any(bool(torch.isin(p, rows).any()) for p in parts)


def _starts(labels: Labels, entry: SitePlan) -> tuple[int, ...]:
    """First row of the producer that each block of the site turns."""
    size = entry.block_size
    features = labels.feature.reshape(-1, entry.blocks * size)
    if not len(features):
        raise LostError("the example inputs hold no token for it")
    context = labels.context.reshape(-1, entry.blocks, size)
    if not bool((features == features[:1]).all()):
        raise LostError("its features come from other places in other tokens")
    if not bool((context == context[..., :1]).all()):
        raise LostError(f"blocks of {size} reach over several heads; choose a block size that divides the head size")
    blocks = features[0].reshape(entry.blocks, size)
    starts = blocks[:, 0]
    if not bool((blocks == starts[:, None] + torch.arange(size)).all()):
        raise LostError(f"the rows that a block of {size} turns are not next to each other in its producer")
    found = sorted(set(starts.tolist()))
    if any(b - a < size for a, b in pairwise(found)):
        raise LostError("blocks turn overlapping rows of its producer")
    return tuple(starts.tolist())
