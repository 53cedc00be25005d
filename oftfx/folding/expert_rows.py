"""The rows that each expert of a layer reads: they are chosen, and for the second product made, inside its forward."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from oftfx.folding.shown import Call, Shown
from oftfx.formats.parametrized import parametrized_names, replace_by
from oftfx.model.structure import HOOKS
from oftfx.placement.find import placements_on
from oftfx.placement.frozen import product_of

_PRODUCTS = ("matmul", "__matmul__", "mm", "bmm")


def rows_of_experts(module: nn.Module, weight: tuple[str, int], shown: Shown) -> list[Shown | None] | None:
    """What each expert multiplies with its part of a parameter.

    The layer is run once more on every call, by a copy of it that has its effective weights as plain floats, and no
    hooks. The unfolded layer is run on the same tokens with the same choice of
    experts, so that row for row the same tokens are compared.

    Args:
        module: the layer, in the model that is being folded.
        weight: name of the parameter ``(experts, ., .)``, and which of its axes is that of the inputs.
        shown: what the layer reads, and how it was called.

    Returns:
        Of each expert its rows, or None where it has got none, or only zeros; None where the forward uses the weight
        otherwise than in products of whole experts.
    """
    if shown.experts is None:
        return None
    calls, fellow = shown.experts.calls, shown.experts.fellow
    found = _rows(module, weight, calls)
    if found is None:
        return None
    beside, others = None, [x for x in shown.unfolded if x is not None]
    if fellow is not None and len(others) == len(calls):
        beside = _rows(fellow, weight, [c.reading(x) for c, x in zip(calls, others, strict=True)])
    return [_shown(found, beside, expert) for expert in range(len(found[0]))]


def _shown(found: list[list[Tensor]], beside: list[list[Tensor]] | None, expert: int) -> Shown | None:
    """Of the batches that have rows for it.

    Who gives every token to all experts gives zeros to most: those are no inputs, and a token that only one of the
    models has given to this expert is none of both.
    """
    rows, unfolded = list[Tensor](), list[Tensor | None]()
    for batch, every in enumerate(found):
        some, other = every[expert], None if beside is None else beside[batch][expert]
        there = some.any(-1)
        if other is not None and other.shape == some.shape:
            there &= other.any(-1)
            unfolded.append(other[there])
        else:
            unfolded.append(None)
        rows.append(some[there])
    kept = [i for i, some in enumerate(rows) if len(some)]
    return Shown([rows[i] for i in kept], [unfolded[i] for i in kept]) if kept else None


@torch.no_grad()
def _rows(module: nn.Module, weight: tuple[str, int], calls: Sequence[Call]) -> list[list[Tensor]] | None:
    """Of every call, of every expert, ``(tokens, in)``."""
    (name, axis), probe, result = weight, _plain(module), list[list[Tensor]]()
    parameter = probe.get_parameter(name)
    for call in calls:
        with _Products(parameter, axis) as seen:
            type(probe).forward(probe, *call.args, **call.kwargs)
        if seen.unknown:
            return None
        empty = call.x.new_empty(0, parameter.shape[axis])
        result.append([torch.cat(rows) if rows else empty for rows in seen.rows])
    return result


def _plain(module: nn.Module) -> nn.Module:
    """A copy that computes the same by plain floats, its rotations in them, expert by expert."""
    probe: Any = object.__new__(type(module))
    vars(probe).update({k: copy.copy(v) if k in ("_parameters", "_modules") else v for k, v in vars(module).items()})
    vars(probe).update({name: OrderedDict() for name in HOOKS})
    for name in parametrized_names(module):  # else each expert would compute all of them
        replace_by(probe, name, nn.Parameter(getattr(module, name).detach(), requires_grad=False))
    for placement in placements_on(module):
        weight_format = placement.weight_format()
        chain = product_of(placement.in_effect())
        if chain and weight_format is not None and placement.module is module:
            layout, old = weight_format.layout(module), probe._parameters[placement.parameter]
            turned = layout.turned_now(weight_format.borrow(module), chain).to(old.dtype)
            new = layout.restore(turned, tuple(old.shape)).contiguous()
            probe._parameters[placement.parameter] = nn.Parameter(new, requires_grad=False)
    if getattr(getattr(probe, "config", None), "_experts_implementation", "eager") != "eager":
        probe.config = copy.deepcopy(probe.config)
        probe.config._experts_implementation = "eager"  # the others gather all experts for one product
    return probe


class _Products(TorchFunctionMode):
    """Notes what is multiplied with each expert of a tensor.

    Args:
        weight: ``(experts, ., .)``, contiguous.
        axis: of the inputs.

    Attributes:
        rows: of each expert, in the order in which they come.
        unknown: whether the tensor was also used in another way.
    """

    def __init__(self, weight: Tensor, axis: int) -> None:
        super().__init__()
        self._place, self._shape = weight.untyped_storage().data_ptr(), weight.shape
        self._start, self._stride, self._axis = weight.storage_offset(), weight.stride(), axis
        self.rows: list[list[Tensor]] = [[] for _ in range(len(weight))]
        self.unknown = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and note what is a product."""
        result = func(*args, **(kwargs or {}))
        used = any(self._is_of_weight(a) for a in (*args, *(kwargs or {}).values()))
        if used and isinstance(result, Tensor) and not self._is_of_weight(result):
            self.unknown |= not self._note(getattr(func, "__name__", ""), args)
        return result

    def _is_of_weight(self, value: Any) -> bool:
        known = isinstance(value, Tensor) and torch._C._has_storage(value)
        return known and value.untyped_storage().data_ptr() == self._place

    def _note(self, name: str, args: Any) -> bool:
        """Whether it was one that is understood."""
        if not (name == "linear" or name in _PRODUCTS) or len(args) < 2 or self._is_of_weight(args[0]):
            return False
        x, weight = args[:2]
        inputs = weight.ndim - (1 if name == "linear" else 2)
        if weight.shape[inputs] != self._shape[self._axis] or weight.stride(inputs) != self._stride[self._axis]:
            return False
        expert, rest = divmod(weight.storage_offset() - self._start, self._stride[0])
        if rest or weight.shape[-2:].numel() != self._stride[0]:
            return False
        if weight.ndim == 2:
            self.rows[expert].append(x.detach().reshape(-1, x.shape[-1]).clone())
        elif x.ndim == 3 and len(x) == len(weight) == len(self.rows):
            for rows, some in zip(self.rows, x.detach().clone(), strict=True):
                rows.append(some)
        else:
            return False
        return True
