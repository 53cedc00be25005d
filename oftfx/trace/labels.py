"""Follow the features of a layer's output through a recorded graph, by running its data movement on labels.

What moves data without computing (view, transpose, expand, split, ...) is executed on a tensor that holds, in place of
every number, the index of the feature that it comes from. So no operation needs a rule of its own about axes. A product
with attention weights, ``A @ V``, adds rows of V: features stay what they are, and only those under the same A may mix.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from oftfx.trace.operand import first_operand, operand

MOVES = frozenset(
    [
        *("view", "reshape", "transpose", "permute", "swapaxes", "movedim", "expand", "expand_as", "repeat", "flatten"),
        *("unflatten", "unsqueeze", "squeeze", "split", "chunk", "unbind", "narrow", "select", "repeat_interleave"),
        *("tensor_split", "broadcast_to", "__getitem__", "t", "moveaxis", "view_as", "reshape_as"),
    ]
)
UNCHANGED = frozenset(
    [*("contiguous", "to", "clone", "detach", "type_as", "float", "half", "bfloat16", "double", "dropout", "dropout_")]
)
_UNCHANGED_MODULES = (nn.Identity, nn.Dropout)
_ATTENTION = "scaled_dot_product_attention"
_MATMUL = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm")


@dataclass(frozen=True)
class Labels:
    """For every number of a value: the feature it comes from, and the attention weights it went through.

    Attributes:
        feature: index of the feature of the producer's output; a tensor, or a tuple of them after a split.
        context: which of several attention products; numbers of one context only may be mixed by a rotation.
        mixed: whether there was such a product.
    """

    feature: Any
    context: Any
    mixed: bool = False


class LostError(Exception):
    """A value is computed from its features in a way that a rotation does not commute with."""


def name_of(node: fx.Node) -> str:
    """Name of what a node calls."""
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def source_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The operand of a node whose features its result carries; None where the node is no such step."""
    name = name_of(node)
    found: Any = None
    if node.op == "call_module":
        if isinstance(modules.get(str(node.target)), _UNCHANGED_MODULES):
            found = first_operand(node)
    elif node.op not in ("call_method", "call_function"):
        return None
    elif name == _ATTENTION:
        found = operand(node, 2, "value")
    elif node.target in _MATMUL:
        found = operand(node, 1, "other", "mat2")
    elif name in MOVES or name in UNCHANGED or node.target is operator.getitem or _is_scaling(node):
        found = first_operand(node)
    return found if isinstance(found, fx.Node) else None


def start(node: fx.Node) -> Labels:
    """Labels of a producer's own output: its last axis, counted.

    Raises:
        LostError: it gives out something other than one tensor.
    """
    if "value" not in node.meta:
        raise LostError(f"{name_of(node)} gives out several values")
    shape = node.meta["value"].shape
    return Labels(torch.arange(shape[-1]).expand(shape), torch.zeros(shape, dtype=torch.long))


def step(node: fx.Node, source: fx.Node, labels: Labels) -> Labels:
    """Labels of a node's result from those of its operand.

    Raises:
        LostError: they get lost there.
    """
    name = name_of(node)
    if _uses_twice(node, source):
        raise LostError(f"{name} reads it twice")
    if name == _ATTENTION or node.target in _MATMUL:
        return _mix(node, name, labels)
    if name in UNCHANGED or node.op == "call_module" or _is_scaling(node):
        return labels

    def move(value: Any) -> Any:
        def known(other: fx.Node) -> Any:
            if other is not source:
                raise LostError(f"{name} takes a size or index that is computed")
            return value

        # Computed ones also hide in the tuples of a subscript and under names.
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
        if name == "view":  # labels are expanded, which a view does not take
            kwargs = {"shape" if k == "size" else k: v for k, v in kwargs.items()}
            return _executed(name, torch.Tensor.reshape, *args, **kwargs)
        if node.op == "call_method":
            return _executed(name, operator.methodcaller(name, *args[1:], **kwargs), args[0])
        return _executed(name, node.target, *args, **kwargs)  # type: ignore[arg-type]

    return Labels(move(labels.feature), move(labels.context), labels.mixed)


def _executed(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a function of torch's on labels. It was called with values: what it does not take is how labels differ."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise LostError(f"{name} could not be followed: {error}") from error


def _uses_twice(node: fx.Node, source: fx.Node) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return sum(a is source for a in found) > 1


def _mix(node: fx.Node, name: str, labels: Labels) -> Labels:
    """``A @ V``: row i of the result adds rows of V, so the features must be the same in all of them."""
    if labels.mixed:
        raise LostError("it goes through two products with attention weights")
    value, shape = labels.feature, node.meta["value"].shape
    if min(len(shape), value.dim()) < 2:
        raise LostError(f"{name} adds different features")
    if node.kwargs.get("enable_gqa") and value.shape[-3] != shape[-3]:
        value = value.repeat_interleave(shape[-3] // value.shape[-3], dim=-3)
    if not bool((value == value[..., :1, :]).all()):
        raise LostError(f"{name} adds different features")
    context = torch.arange(torch.Size(shape[:-2]).numel()).reshape(*shape[:-2], 1, 1).expand(shape)
    return Labels(_executed(name, torch.Tensor.expand, value[..., :1, :], shape), context, mixed=True)


def _is_scaling(node: fx.Node) -> bool:
    """A product with, or division by, a plain number; not one that rounds."""
    factor = operand(node, 1, "other")
    rounds = node.kwargs.get("rounding_mode") is not None
    return name_of(node) in ("mul", "div", "truediv") and isinstance(factor, (int, float)) and not rounds
