"""Which node of a recorded graph computes which value: a tensor is known by its identity."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from oftfx.errors import TraceError
from oftfx.trace.functions import items_of
from oftfx.trace.symbols import SymbolNodes
from oftfx.trace.torch_private import is_fake, pytree
from oftfx.trace.value import Value

_SCALARS = (int, float, str, bool, complex, torch.dtype, torch.device, torch.memory_format, torch.layout)
_WITHOUT = (torch.Size, torch.dtype, torch.device, int, bool, type(None))  # what is asked of tensors all the time


class ValueNodes:
    """Values and their nodes, each once.

    Args:
        graph: gets nodes for parameters, constants and parts of results.
        root: what is recorded, a copy.
        model: what it is a copy of.
        leaves: modules of the copy that become one node.
        made: gets the fake tensors; None where there are none.
        running: paths of the modules that run now, the innermost last.

    Attributes:
        symbols: the same for symbolic sizes.
        constants: tensors that are neither inputs, parameters nor results, by attribute name.
    """

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        model: nn.Module,
        leaves: set[nn.Module],
        made: list[weakref.ref[torch.Tensor]] | None,
        running: list[str],
    ) -> None:
        self.graph, self._root, self._leaves, self._made, self._running = graph, root, leaves, made, running
        self.symbols = SymbolNodes(graph)
        self.constants: dict[str, torch.Tensor] = {}
        self._attributes = _names_by_id(root)
        # A function that the model made of itself (a lambda over `self`) is the same one in a copy: reads the model's.
        self._outside = {k: n for k, n in _names_by_id(model).items() if k not in self._attributes}
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []  # ids are only unique among living objects

    def bind(self, value: torch.Tensor, node: fx.Node) -> None:
        """Say that ``node`` computes ``value``."""
        self._nodes[id(value)] = node
        self._alive.append(value)
        self.note_made(value)
        node.meta.setdefault("value", value)

    def note_made(self, value: torch.Tensor) -> None:
        """Remember a fake tensor of the recording, whoever made it."""
        if self._made is not None and is_fake(value):
            self._made.append(weakref.ref(value))

    def node_of(self, value: torch.Tensor) -> fx.Node:
        """The node that computes a tensor; parameters and constants become ``get_attr`` nodes."""
        node = self._nodes.get(id(value))
        if node is not None:
            return node
        name = self._attributes.get(id(value)) or self._read_outside(value)
        if name is None:
            if self._made is not None and is_fake(value):
                raise TraceError(
                    f"a tensor {tuple(value.shape)} used in {self._place()} was made by code that torch functions do "
                    "not show (a custom kernel outside a leaf module)"
                )
            name = f"_constant_{len(self.constants)}"
            self.constants[name] = value
        node = self.graph.create_node("get_attr", name)
        self.bind(value, node)
        return node

    def _read_outside(self, value: torch.Tensor) -> str | None:
        name = self._outside.get(id(value))
        if name is not None and self._root.get_submodule(name.rpartition(".")[0]) in self._leaves:
            raise TraceError(
                f"{name} is read in {self._place()} by a function that holds the model itself (a lambda or a wrapped "
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
        raise TraceError(f"an argument of type {type(value).__name__} in {self._place()} cannot stand in a graph")

    def replaced(self, later: ValueNodes) -> str:
        """The name of a parameter or buffer that is another one in a later recording of the same copy, or ""."""
        now = {name: key for key, name in later._attributes.items()}
        return next((name for key, name in self._attributes.items() if now.get(name) != key), "")

    def track(self, out: Any, node: fx.Node) -> None:
        """Say that ``node`` computes a result, with what is inside it."""
        if isinstance(out, torch.Tensor):
            self.bind(out, node)
            return
        for key, item, getter in items_of(out):
            if has_tensor(item):
                self.track(item, self.graph.call_function(getter, (node, key)))

    def _place(self) -> str:
        return (self._running and self._running[-1]) or type(self._root).__name__

    def release(self) -> None:
        """Let go of every tensor: what the nodes keep of theirs is a `Value`."""
        self._nodes.clear()
        self._alive.clear()
        for node in self.graph.nodes:
            if "value" in node.meta:
                node.meta["value"] = Value.of(node.meta["value"])


def has_tensor(value: Any) -> bool:
    """Whether a value is or holds a tensor."""
    if isinstance(value, torch.Tensor) or type(value) in _WITHOUT:
        return isinstance(value, torch.Tensor)
    return any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value))


def _names_by_id(module: nn.Module) -> dict[int, str]:
    """First names of a module's parameters and buffers."""
    names: dict[int, str] = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), name)
    return names
