"""The recorder: the real Python runs once, and FX nodes come out.

Nothing is proxied, so shapes, branches and third-party code behave as always. Every torch function that returns a
tensor becomes a node; every *leaf* module (a site, or a module without sites in it) becomes one ``call_module`` node.
Everything else is looked through. A tensor is known by its identity, a symbolic size by its expression.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from oftfx.errors import TraceError, UnrecordableError
from oftfx.placement.find import placements_on, without_rotation
from oftfx.placement.input import RotateInput
from oftfx.placement.output import RotateOutput
from oftfx.rotation.caching import no_cache
from oftfx.trace.foreign import foreign, is_ours
from oftfx.trace.functions import DATA_DEPENDENT, OPERATORS, QUESTIONS, items_of
from oftfx.trace.known_shapes import KnownShapes
from oftfx.trace.shared import Shared
from oftfx.trace.symbols import SymbolNodes
from oftfx.trace.torch_private import (
    CALL,
    call_of,
    in_checkpoint,
    inside_functorch,
    is_fake,
    pytree,
    switches_gradients,
)
from oftfx.trace.value import Value

_SCALARS = (int, float, str, bool, complex, torch.dtype, torch.device, torch.memory_format, torch.layout)


class Recorder(TorchFunctionMode):
    """Records one forward of ``root``, a copy of ``model``, into ``graph``. Used through `oftfx.trace.record`.

    Args:
        root: the copy.
        model: what it is a copy of.
        leaves: modules of the copy that become one node.
        made: gets the fake tensors of the recording; None where it runs on real values.

    Attributes:
        graph: the nodes.
        constants: tensors that are neither inputs, parameters nor results, by attribute name.
        data_dependent: ``(function, module path)`` of every value that steered Python.
        calls: how often each module ran.
        asked: what the model asked of tensors besides their sizes: ``"strides"``, ``"gradients"``.
    """

    def __init__(
        self, root: nn.Module, model: nn.Module, leaves: set[nn.Module], made: list[weakref.ref[torch.Tensor]] | None
    ) -> None:
        super().__init__()
        self.root, self.leaves, self.fake, self._made = root, leaves, made is not None, made
        self._shared = Shared(root, model)
        self.graph = fx.Graph()
        self.symbols = SymbolNodes(self.graph)
        self.constants: dict[str, torch.Tensor] = {}
        self.data_dependent: list[tuple[str, str]] = []
        self.autocast_changes: list[str] = []
        self.asked: set[str] = set()
        self.calls: dict[str, int] = {}
        self._names = {m: n for n, m in root.named_modules()}
        self._attributes = _names_by_id(root)
        # A function that the model made of itself (a lambda over `self`) is the same one in a copy: reads the model's.
        self._outside = {k: n for k, n in _names_by_id(model).items() if k not in self._attributes}
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []  # ids are only unique among living objects
        self._stack: list[str] = []
        self._on = True
        self._known = KnownShapes()
        self._autocast = {d: torch.is_autocast_enabled(d) for d in ("cpu", "cuda")}

    # -- values ---------------------------------------------------------------------------------

    def bind(self, value: torch.Tensor, node: fx.Node) -> None:
        """Say that ``node`` computes ``value``."""
        self._nodes[id(value)] = node
        self._alive.append(value)
        self._note_made(value)
        node.meta.setdefault("value", value)

    def _note_made(self, value: torch.Tensor) -> None:
        if self._made is not None and is_fake(value):
            self._made.append(weakref.ref(value))

    def node_of(self, value: torch.Tensor) -> fx.Node:
        """The node that computes a tensor; parameters and constants become ``get_attr`` nodes."""
        node = self._nodes.get(id(value))
        if node is not None:
            return node
        name = self._attributes.get(id(value)) or self._read_outside(value)
        if name is None:
            if self.fake and is_fake(value):
                raise TraceError(
                    f"a tensor {tuple(value.shape)} used in {self.place} was made by code that torch functions do not "
                    "show (a custom kernel outside a leaf module)"
                )
            name = f"_constant_{len(self.constants)}"
            self.constants[name] = value
        node = self.graph.create_node("get_attr", name)
        self.bind(value, node)
        return node

    def _read_outside(self, value: torch.Tensor) -> str | None:
        name = self._outside.get(id(value))
        if name is not None and self.root.get_submodule(name.rpartition(".")[0]) in self.leaves:
            raise TraceError(
                f"{name} is read in {self.place} by a function that holds the model itself (a lambda or a wrapped "
                "forward), so a copy of the model would not run its own layers. Make it a method, or bind it with "
                "functools.partial"
            )
        return name

    def known(self, values: Iterable[torch.Tensor]) -> tuple[fx.Node, ...]:
        """The nodes of those tensors that the recording has met, each once."""
        return tuple(dict.fromkeys(self._nodes[id(v)] for v in values if id(v) in self._nodes))

    def argument(self, value: Any) -> Any:
        """A value as argument of a node."""
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.symbols.node_of(value)
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if isinstance(value, (tuple, list)):
            items = [self.argument(v) for v in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {k: self.argument(v) for k, v in value.items()}
        if value is None or value is Ellipsis or isinstance(value, _SCALARS):
            return value
        raise TraceError(f"an argument of type {type(value).__name__} in {self.place} cannot stand in a graph")

    def _track(self, out: Any, node: fx.Node) -> None:
        if isinstance(out, torch.Tensor):
            self.bind(out, node)
            return
        for key, item, getter in items_of(out):
            if _has_tensor(item):
                self._track(item, self.graph.call_function(getter, (node, key)))

    @property
    def where(self) -> str:
        """Module path that runs now; that of the model itself is empty."""
        return self._stack[-1] if self._stack else ""

    @property
    def place(self) -> str:
        """The same for a message; the model itself has no path."""
        return self.where or type(self.root).__name__

    def doubts(self) -> list[str]:
        """Why the graph need not stand for other values."""
        found = []
        if self.data_dependent:
            steps = [f"{n}() in {where or 'the model'}" for n, where in self.data_dependent]
            found.append("depends on data: " + ", ".join(steps[:3]))
        if self.autocast_changes:
            found.append(f"autocast is switched inside {self.autocast_changes[0]}")
        return found

    def release(self) -> None:
        """Let go of every tensor: what the nodes keep of theirs is a `Value`."""
        self._nodes.clear()
        self._alive.clear()
        self._known = KnownShapes()
        for node in self.graph.nodes:
            if "value" in node.meta:
                node.meta["value"] = Value.of(node.meta["value"])

    # -- functions ------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if (target := self._shared.written(name, args, kwargs)) is not None:
            raise UnrecordableError(
                f"{self.place} writes into a {tuple(target.shape)} parameter of the model, which a recording would "
                "change. Write in the training loop instead, or into a buffer"
            )
        if not self._on or (args and inside_functorch(args[0])):
            out = foreign(func, *args, **kwargs)
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, torch.Tensor):
                    self._note_made(value)
            return out
        if switches_gradients(func):
            if in_checkpoint():
                return None  # the graph computes what is checkpointed once, with its gradients
            self.graph.call_function(func, args)
            return foreign(func, *args, **kwargs)
        out = foreign(func, *args, **kwargs)
        if name in DATA_DEPENDENT:
            self.data_dependent.append((name, self.where))
        if name != "__setitem__" and not _has_tensor(out):
            self._note_question(func, name)
            return out  # .shape, .dtype and the like: executed, not recorded
        self._note_autocast()
        node = self._emit(func, name, self.argument(tuple(args)), self.argument(dict(kwargs)))
        node.meta["module"] = self.where
        if name != "__setitem__":
            self._track(out, node)
        return out

    def _emit(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> fx.Node:
        if name == "__get__":  # x.mT, x.real, ...
            return self.graph.call_function(getattr, (args[0], func.__self__.__name__))  # type: ignore[attr-defined]
        is_method = getattr(torch.Tensor, name, None) is func
        if is_method and name in OPERATORS:
            return self.graph.call_function(OPERATORS[name], args, kwargs)
        if is_method:
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)

    def _note_question(self, func: Any, name: str) -> None:
        """What the model, not our own code, asks of a tensor besides its size may decide what it does."""
        about = QUESTIONS.get(func.__self__.__name__ if name == "__get__" else name)
        if about is not None and not is_ours(sys._getframe(2)):
            self.asked.add(about)

    def _note_autocast(self) -> None:
        for device, state in self._autocast.items():
            if torch.is_autocast_enabled(device) != state:
                self.autocast_changes.append(self.where)

    # -- modules --------------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record everything that runs inside: torch functions and calls of the root's modules."""
        for module, name in self._names.items():
            vars(module)[CALL] = partial(self._call, name, module)
        try:
            with no_cache(), self:
                yield
        finally:
            self._on = False
            for module in self._names:
                vars(module).pop(CALL, None)  # without a circle through the recorder the copy is gone at once

    def _call(self, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self._on:
            return call_of(module)(*args, **kwargs)
        self.calls[name] = self.calls.get(name, 0) + 1
        self._stack.append(name)
        try:
            if module in self.leaves:
                return self._leaf(name, module, args, kwargs)
            return call_of(module)(*args, **kwargs)
        finally:
            self._stack.pop()

    def _leaf(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        # The rotation before or behind a site is recorded; only the layer's own forward is opaque.
        placements = placements_on(module)
        for placement in placements:
            if isinstance(placement, RotateInput):
                args, kwargs = placement(module, args, kwargs) or (args, kwargs)
        node_args, node_kwargs = self.argument(tuple(args)), self.argument(dict(kwargs))
        self._note_autocast()
        self._on = False
        try:
            with without_rotation(module):
                out = _distinct(self._run_leaf(module, args, kwargs), (args, kwargs))
        finally:
            self._on = True
        node = self.graph.call_module(name, node_args, node_kwargs)
        node.meta["module"] = name
        self._track(out, node)
        for placement in placements:
            if isinstance(placement, RotateOutput):
                rotated = placement(module, args, out)
                out = out if rotated is None else rotated
        return out

    def _run_leaf(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        run = partial(call_of(module), *args, **kwargs)
        x = args[0] if args else kwargs.get("input")
        if not self.fake or not isinstance(x, torch.Tensor):
            return run()
        return self._known.result(module, x, run, alone=len(args) + len(kwargs) == 1)


def _names_by_id(module: nn.Module) -> dict[int, str]:
    """First names of a module's parameters and buffers."""
    names: dict[int, str] = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), name)
    return names


def _has_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value))


def _distinct(out: Any, inputs: Any) -> Any:
    """Give a leaf's result an identity of its own where the leaf returned its input (Dropout in eval mode).

    Otherwise a residual connection around it would be recorded as if it read the leaf's output.
    """
    known = {id(t) for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)}
    return pytree.tree_map_only(torch.Tensor, lambda t: t.view_as(t) if id(t) in known else t, out)
