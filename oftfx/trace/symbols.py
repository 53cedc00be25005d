"""Symbolic sizes as graph nodes: ``s0 * s1 + 1`` becomes ``size``, ``mul`` and ``add``."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from oftfx.trace.torch_private import computed


class SymbolNodes:
    """Turns expressions over input sizes into nodes, each symbol and expression once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._tracer = fx.proxy.GraphAppendingTracer(graph)
        self._symbols: dict[Any, fx.Proxy] = {}
        self._done: dict[Any, Any] = {}

    def define(self, size: Any, node: fx.Node, dim: int) -> None:
        """Say that a size of an input is read from ``node.size(dim)``; constants and known symbols are skipped."""
        if not isinstance(size, torch.SymInt):
            return
        expression = size.node.expr
        if expression.is_Symbol and expression not in self._symbols:
            self._symbols[expression] = fx.Proxy(self._graph.call_method("size", (node, dim)), self._tracer)

    def node_of(self, value: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
        """Node (or plain number, where a guard has fixed it) of a symbolic value."""
        expression = value.node.expr
        if not expression.free_symbols:
            return float(expression) if isinstance(value, torch.SymFloat) else int(expression)
        if expression not in self._done:
            result = computed(expression, self._symbols)
            self._done[expression] = result.node if isinstance(result, fx.Proxy) else result
        return self._done[expression]
