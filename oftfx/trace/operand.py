"""Operands of a recorded call, given by position or by name."""

from __future__ import annotations

from typing import Any

import torch.fx as fx


def operand(node: fx.Node, index: int, *names: str) -> Any:
    """The argument at a position or, where the call is shorter, under the first of the names it has; else None."""
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def first_operand(node: fx.Node) -> Any:
    """What a call works on: a layer's input, or what torch's functions call so (but for ``split``)."""
    return operand(node, 0, "input", "tensor")
