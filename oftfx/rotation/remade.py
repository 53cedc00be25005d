"""What a backward pass needs is made again from what is there anyway, where that is quicker than to keep it.

Both ways are exact: the same operations on the same numbers. Neither is taken where somebody else sees to what is
saved (`torch.compile`, gradient checkpointing and other hooks on saved tensors) or wants to see the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function


def is_plain(*tensors: Tensor) -> bool:
    """Whether gradients are recorded of plain tensors, and by autograd alone."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or has_torch_function(tensors):
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def remade(make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``make(*tensors)``, of which nothing but the tensors is kept: backward makes it again, with what it saves.

    Args:
        make: of the tensors and of nothing that changes; the same each time.
        tensors: any number.
    """
    if is_plain(*tensors) and any(t.requires_grad for t in tensors):
        result: Tensor = _Remade.apply(make, *tensors)  # type: ignore[no-untyped-call]
        return result
    return make(*tensors)


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.make, ctx.ahead = make, []
        ctx.save_for_backward(*tensors)
        return make(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        onwards = torch.is_grad_enabled()  # backward of backward goes through the tensors themselves
        asked = ctx.needs_input_grad[1:]
        tensors, result = ctx.saved_tensors, None
        if not onwards:
            tensors, result = ctx.ahead.pop() if ctx.ahead else _made(ctx, tensors)
        with torch.enable_grad():
            if result is None:
                result = ctx.make(*tensors)
            of = [t for t, a in zip(tensors, asked, strict=True) if a]
            found = iter(torch.autograd.grad(result, of, grad, create_graph=onwards, allow_unused=True))
        return None, *(next(found) if a else None for a in asked)


Made = tuple[Sequence[Tensor], Tensor]


def _made(ctx: Any, tensors: Sequence[Tensor]) -> Made:
    """The result with a history of its own, which ends at the tensors."""
    asked = ctx.needs_input_grad[1:]
    tensors = [t.detach().requires_grad_(a) for t, a in zip(tensors, asked, strict=True)]
    with torch.enable_grad():
        return tensors, ctx.make(*tensors)


def is_remade(node: Any) -> bool:
    """Whether a node of autograd is that of a result of `remade`."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) and hasattr(node, "ahead")


def again(node: Any, tensors: Sequence[Tensor]) -> Tensor:
    """A result of `remade` again, to be read only, for a backward that comes before its own, which is spared the work.

    Args:
        node: of the result.
        tensors: what it was made of, unchanged, without a history.
    """
    if torch.is_grad_enabled():  # its own backward will have to go through the tensors themselves
        with torch.no_grad():
            result: Tensor = node.make(*tensors)
        return result
    try:  # another thread may be in the same graph
        made: Made = node.ahead.pop()
    except IndexError:
        made = _made(node, tensors)
    node.ahead[:] = [made]
    return made[1].detach()


def maker_of(x: Tensor) -> Callable[[], Tensor] | None:
    """Makes ``x`` again in backward, from what autograd keeps for the products and casts that have made it.

    So are the inputs of most layers of a transformer: a normalized row times a weight, a gate times a value. None for
    everything else. Only to be called by a backward that comes before those of the products.
    """
    if x._version or x.grad_fn is None or is_watched():
        return None
    try:
        found = _maker(x.grad_fn, x.dtype, 3)
    except RuntimeError:  # one of them has been written to since
        return None
    return found[0] if found is not None and found[1] == x.shape else None


def is_watched() -> bool:
    """Whether somebody's hooks see what is saved, or torch does not say."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None


Found = tuple[Callable[[], Tensor], torch.Size]


def _maker(node: Any, dtype: torch.dtype, depth: int) -> Found | None:
    """A maker for the result of a node, and its shape; ``dtype`` is what the result has for certain."""
    kind = node.name() if node is not None and depth else ""
    if kind == "ToCopyBackward0":
        wide = _maker_of_product(node.next_functions[0][0], None, depth - 1)
        return None if wide is None else (lambda: wide[0]().to(dtype), wide[1])
    return _maker_of_product(node, dtype, depth) if kind == "MulBackward0" else None


def _maker_of_product(node: Any, dtype: torch.dtype | None, depth: int) -> Found | None:
    if node is None or node.name() != "MulBackward0":
        return None
    a, b = node._saved_self, node._saved_other
    if a is not None and b is not None:
        if dtype is not None and torch.result_type(a, b) != dtype:
            return None
        return lambda: node._saved_self * node._saved_other, torch.broadcast_shapes(a.shape, b.shape)
    # One factor needs no gradient, so the other was not kept. Where the one is as narrow as the product, the other has
    # its dtype: nothing narrower may stand between but a cast, and none is followed to a float32.
    there, index = (b, 0) if a is None else (a, 1)
    inner = node.next_functions[index][0]
    if there is None or not there.dim() or there.dtype != dtype:
        return None
    if dtype not in (torch.bfloat16, torch.float16) and (inner is None or inner.name() != "MulBackward0"):
        return None
    other = _maker(inner, dtype, depth - 1)
    if other is None:
        return None
    return lambda: _saved(node, index) * other[0](), torch.broadcast_shapes(there.shape, other[1])


def _saved(node: Any, index: int) -> Tensor:
    saved: Tensor = node._saved_self if index else node._saved_other
    return saved
