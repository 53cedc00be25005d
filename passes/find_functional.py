"""Find weights that code uses by itself, ``F.linear(x, self.w)``, and say how they are stored and who reads them."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F

from oftfx.formats.dense import DenseParameter
from oftfx.formats.layout import Layout
from oftfx.model.index import ModelIndex
from oftfx.model.names import read_as
from oftfx.model.site import Site
from oftfx.model.sites import Finder
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.planning.program import Program
from oftfx.planning.unreachable import is_matrix
from oftfx.trace.operand import first_operand, operand

_LINEAR = (F.linear, torch._C._nn.linear)
_ADDMM = (torch.addmm, torch.baddbmm)
_MATMUL = (torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul", "mm", "bmm")
_SECOND = ("weight", "other", "mat2")
_TRANSPOSE = (torch.t, torch.transpose, torch.swapaxes, "t", "transpose", "swapaxes")
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d)
_UNCHANGED = ("to", "type", "contiguous", "clone", "float", "half", "bfloat16", "double", "type_as", torch.clone)


class UnclearUseError(Exception):
    """A use of a weight from which its meaning cannot be read."""


@dataclass(frozen=True)
class Use:
    """One place where a weight is an operand.

    Attributes:
        layout: how the weight is stored, seen from there.
        module: path of the module whose forward runs.
    """

    layout: Layout
    module: str


class FindFunctional(Pass):
    """Read the recorded graph: a parameter whose every use is a product with it as operand becomes a site.

    A layer that is never called and whose weight other code reads becomes a site as well, rotated where it is read. A
    weight that is read *and* belongs to a layer that is called cannot be rotated: one of the two would change silently.

    Examples:
        >>> import torch
        >>> from oftfx.passes import FindFunctional, Program
        >>> from oftfx.trace.record import record
        >>> class Scores(torch.nn.Sequential):
        ...     def forward(self, x):
        ...         return x @ self[0].weight.T
        >>> model = Scores(torch.nn.Linear(6, 4))
        >>> FindFunctional().run(Program.of(model, record(model, (torch.randn(5, 6),)))).changes[0].action
        'read by the model itself'
    """

    name = "find_functional"
    preserves = "exact"

    def run(self, program: Program) -> PassResult:
        """Extend ``sites`` and ``refused``."""
        recording = program.recording
        if recording is None or recording.rung == "tree":
            return PassResult(program, False)
        finder = Finder(program.index)
        parameters = program.index.parameters
        sites = {s.weight_name: s for s in program.sites}
        refused, changes = dict(program.refused), list[Change]()
        reads: dict[str, list[fx.Node]] = defaultdict(list)
        for node in recording.graph.nodes:
            if node.op == "get_attr" and node.target in parameters and is_matrix(parameters[str(node.target)]):
                reads[str(node.target)].append(node)
        for name, nodes in reads.items():
            if _path(name) in program.refused:
                continue  # a site that was refused is not there any more to speak against it
            names = program.index.names[id(parameters[name])]
            known = sites.get(name)
            if known is not None and not known.is_layer and len(names) == 1:
                continue  # attention and experts are known by their class, and read their weights by themselves
            called = [s.fqn for n in names if (s := sites.get(n)) and recording.calls.get(s.module)]
            try:
                if called or len(names) > 1:
                    raise UnclearUseError(_also_read(nodes, called, names))
                site = _site(finder, program.model, name, [u for n in nodes for u in _uses(n)])
            except UnclearUseError as reason:
                for each in names:
                    sites.pop(each, None)
                    refused[_path(each)] = str(reason)
                    changes.append(Change(_path(each), "not a site", str(reason), refused=True))
                continue
            sites[name] = site
            changes.append(Change(site.fqn, f"read by {site.called or 'the model itself'}"))
        if not changes:
            return PassResult(program, False)
        found = tuple(sites.values())
        result = program.with_(sites=_in_order(found, program.index), refused=refused)
        return PassResult(result, True, tuple(changes))


def _path(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return module if leaf == "weight" and module else name


def _also_read(nodes: list[fx.Node], called: list[str], names: list[str]) -> str:
    reader = next((u.meta.get("module") for n in nodes for u in n.users), "") or "the model itself"
    if called:
        return f"its weight is also read by other code (in {reader}), which a rotation would not reach"
    return f"its weight has several names ({', '.join(names)}) and is read by code in {reader}, by any of them"


def _site(finder: Finder, model: nn.Module, name: str, uses: list[Use]) -> Site:
    holder, _, parameter = name.rpartition(".")
    if len({u.layout for u in uses}) != 1:
        kinds = sorted({u.layout.stored for u in uses})
        raise UnclearUseError(
            f"its uses disagree on how it is stored: {', '.join(kinds) or 'it is not used as an operand'}"
        )
    reader = holder
    for use in uses:
        reader = _common(reader, use.module)
    module = model.get_submodule(holder)
    found = DenseParameter(parameter, uses[0].layout)
    if not found.matches(module):
        raise UnclearUseError("it is no plain float parameter")
    return finder.site(module, found, parameter, None if reader == holder else reader)


def _common(a: str, b: str) -> str:
    """The innermost module path that contains both."""
    result = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        result.append(x)
    return ".".join(result)


def _uses(node: fx.Node, turned: bool = False, indexed: bool = False) -> Iterator[Use]:
    """Follow a weight to the products that it is an operand of.

    ``turned``: its last two axes are swapped by now; ``indexed``: one expert was picked out of it.
    """
    for user in node.users:
        target = user.target
        if target in _UNCHANGED and first_operand(user) is not node:
            continue  # x.type_as(w): only the dtype of the weight is read
        if target in _UNCHANGED:
            yield from _uses(user, turned, indexed)
        elif _is_transpose(user):
            yield from _uses(user, not turned, indexed)
        elif target in (operator.getitem, "__getitem__") and user.args[0] is node and _picks_one(user):
            yield from _uses(user, turned, True)
        else:
            yield Use(_layout(user, node, turned, indexed), user.meta.get("module", ""))


def _layout(user: fx.Node, node: fx.Node, turned: bool, indexed: bool) -> Layout:
    target, where = user.target, user.meta.get("module") or "the model itself"
    if user.op == "output":
        raise UnclearUseError("the model returns it")
    at = _place(user, node)
    if target in (*_CONVOLUTIONS, F.embedding) and at == 1 and not turned and not indexed:
        return Layout(side="output") if target is F.embedding else Layout()
    if (target in _LINEAR and at == 1) or (target in _MATMUL and at == 0):
        columns = False
    elif (target in _MATMUL and at == 1) or (target in _ADDMM and at == 2):
        columns = True
    else:
        what = getattr(target, "__name__", str(target))
        raise UnclearUseError(f"it is used by {what} in {where}, where no axis is its input")
    stored = "columns" if columns != turned else "rows"
    if len(node.meta["value"].shape) == 3 or indexed:
        return Layout("experts_columns" if stored == "columns" else "experts")
    return Layout(stored)  # type: ignore[arg-type]


def _place(user: fx.Node, node: fx.Node) -> int | None:
    """Which of the first three operands a weight is; None where it is none or several of them."""
    second, third = (("mat1", "batch1"), ("mat2", "batch2")) if user.target in _ADDMM else (_SECOND, ())
    operands = (first_operand(user), operand(user, 1, *second), operand(user, 2, *third))
    places = [i for i, value in enumerate(operands) if value is node]
    return places[0] if len(places) == 1 else None


def _is_transpose(user: fx.Node) -> bool:
    """Whether a call swaps the last two axes."""
    if "value" not in user.meta:
        return False
    count = len(user.meta["value"].shape)
    if user.target is getattr:
        return user.args[1] == "mT" or (user.args[1] == "T" and count == 2)
    if user.target not in _TRANSPOSE:
        return False
    dims = [operand(user, 1, "dim0", "axis0"), operand(user, 2, "dim1", "axis1")]
    if dims == [None, None]:
        return count == 2  # t()
    return all(isinstance(d, int) for d in dims) and {d % count for d in dims} == {count - 2, count - 1}


def _picks_one(user: fx.Node) -> bool:
    """Whether a subscript picks experts out of a 3-D tensor, by number or by a tensor of numbers."""
    weight, index = user.args
    return len(weight.meta["value"].shape) == 3 and isinstance(index, (int, fx.Node))  # type: ignore[union-attr]


def _in_order(sites: tuple[Site, ...], index: ModelIndex) -> tuple[Site, ...]:
    """In the order of the module tree; a quantized layer need not have a parameter called weight.

    What a module computes stands after what it holds, as its parametrizations are children of it.
    """
    order: dict[str, int] = {}
    for module, paths in index.paths.items():
        for path in paths:
            for name in (*module._parameters, "weight"):
                order.setdefault(read_as(f"{path}.{name}" if path else name), len(order))
    return tuple(sorted(sites, key=lambda s: order.get(s.weight_name, -1)))
