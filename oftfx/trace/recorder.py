"""The recorder: the real Python runs once, and FX nodes come out.

Nothing is proxied, so shapes, branches and third-party code behave as always. Every torch function that returns a
tensor becomes a node; every *leaf* module (a site, or a module without sites in it) becomes one ``call_module`` node.
Everything else is looked through. A tensor is known by its identity, a symbolic size by its expression.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from oftfx.errors import UnrecordableError
from oftfx.placement.find import placements_on, without_rotation
from oftfx.placement.input import RotateInput
from oftfx.placement.output import RotateOutput
from oftfx.rotation.caching import no_cache
from oftfx.trace.foreign import foreign, is_ours
from oftfx.trace.functions import DATA_DEPENDENT, METHODS, OPERATORS, QUESTIONS
from oftfx.trace.known_shapes import KnownShapes
from oftfx.trace.repeated import Repeated
from oftfx.trace.shared import Shared
from oftfx.trace.torch_private import (
    CALL,
    FakeTensors,
    call_of,
    in_checkpoint,
    inside_functorch,
    pytree,
    switches_gradients,
)
from oftfx.trace.value_nodes import ValueNodes, has_tensor


class Recorder(TorchFunctionMode):
    """Records one forward of ``root``, a copy of ``model``, into ``graph``. Used through `oftfx.trace.record`.

    Args:
        root: the copy.
        model: what it is a copy of.
        leaves: modules of the copy that become one node.
        made: gets the fake tensors of the recording; None where it runs on real values.

    Attributes:
        graph: the nodes.
        values: which node computes which tensor.
        data_dependent: ``(function, module path)`` of every value that steered Python.
        calls: how often each module ran.
        asked: what the model asked of tensors besides their sizes: ``"strides"``, ``"gradients"``.
    """

    def __init__(
        self, root: nn.Module, model: nn.Module, leaves: set[nn.Module], made: list[weakref.ref[torch.Tensor]] | None
    ) -> None:
        super().__init__()
        self.root, self.leaves, self.fake = root, leaves, made is not None
        self._shared = Shared(root, model)
        self.graph = fx.Graph()
        self._stack: list[str] = []
        self.values = ValueNodes(self.graph, root, model, leaves, made, self._stack)
        self.data_dependent: list[tuple[str, str]] = []
        self.autocast_changes: list[str] = []
        self.asked: set[str] = set()
        self.calls: dict[str, int] = {}
        self._names = {m: n for n, m in root.named_modules()}
        self._on = True
        self._known = KnownShapes()
        self._repeated: Repeated | None = None
        self._autocast = {d: torch.is_autocast_enabled(d) for d in ("cpu", "cuda")}

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
        self.values.release()
        self._known, self._repeated = KnownShapes(), None

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
                f"{self.place} writes into a parameter or a large buffer of the model, {tuple(target.shape)}, which a "
                "recording would change. Write in the training loop instead, or into a buffer of floats"
            )
        if not self._on or (args and inside_functorch(args[0])):
            out = foreign(func, *args, **kwargs)
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, torch.Tensor):
                    self.values.note_made(value)
            return out
        if switches_gradients(func):
            if in_checkpoint():
                return None  # the graph computes what is checkpointed once, with its gradients
            self.graph.call_function(func, args)
            return foreign(func, *args, **kwargs)
        out = (
            foreign(func, *args, **kwargs)
            if self._repeated is None
            else self._repeated.result(func, name, args, kwargs)
        )
        if name in DATA_DEPENDENT:
            self.data_dependent.append((name, self.where))
        if name != "__setitem__" and not has_tensor(out):
            self._note_question(func, name)
            return out  # .shape, .dtype and the like: executed, not recorded
        self._note_autocast()
        node = self._emit(func, name, self.values.argument(tuple(args)), self.values.argument(dict(kwargs)))
        node.meta["module"] = self.where
        if name != "__setitem__":
            self.values.track(out, node)
        return out

    def _emit(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> fx.Node:
        if name == "__get__":  # x.mT, x.real, ...
            return self.graph.call_function(getattr, (args[0], func.__self__.__name__))  # type: ignore[attr-defined]
        name = METHODS.get(func, name) if isinstance(func, FunctionType) else name
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
        if self.fake:
            fakes = FakeTensors()
            self._known, self._repeated = KnownShapes(fakes), Repeated(fakes)
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
        node_args, node_kwargs = self.values.argument(tuple(args)), self.values.argument(dict(kwargs))
        self._note_autocast()
        self._on = False
        try:
            with without_rotation(module):
                out = _distinct(self._run_leaf(module, args, kwargs), (args, kwargs))
        finally:
            self._on = True
        node = self.graph.call_module(name, node_args, node_kwargs)
        node.meta["module"] = name
        self.values.track(out, node)
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


def _distinct(out: Any, inputs: Any) -> Any:
    """Give a leaf's result an identity of its own where the leaf returned its input (Dropout in eval mode).

    Otherwise a residual connection around it would be recorded as if it read the leaf's output.
    """
    args, kwargs = inputs
    if isinstance(out, torch.Tensor) and not kwargs and len(args) == 1 and out is not args[0]:
        return out  # nearly always
    known = {id(t) for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)}
    return pytree.tree_map_only(torch.Tensor, lambda t: t.view_as(t) if id(t) in known else t, out)
