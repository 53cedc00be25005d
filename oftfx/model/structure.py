"""Copies of a model's structure that share its weights."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn as nn

from oftfx.errors import OftfxError
from oftfx.formats.registry import format_of

M = TypeVar("M", bound=nn.Module)

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Attributes of a module that hold its forward hooks."""


def structural_copy(model: M, memo: dict[int, Any] | None = None) -> M:
    """A module tree of its own over the same weights: same classes, names, hooks and attributes.

    Parameters are new ones over the same memory, so freezing or moving the copy leaves the original alone. Other
    tensors that a forward may write into (statistics, counters: floats of any size, few other numbers) are copied, for
    training the copy must not change the original; those of quantized layers are the same objects. A quantized layer
    whose runtime may rewrite its weight in place gets state objects of its own over the same bytes
    (`WeightFormat.own`).

    Args:
        model: any module.
        memo: filled, as by ``copy.deepcopy``, with what each object became, by its id.

    Raises:
        OftfxError: something in the model cannot be copied (a lock, an open file).
    """
    memo = {} if memo is None else memo
    seen: set[int] = set()
    formats = {m: f for m in model.modules() if (f := format_of(m)) is not None and not f.lossless}
    own = _Owned(model)
    for module in model.modules():
        if module not in formats:
            memo.update((id(t), own.copy(t)) for t in _plain_tensors(module) if id(t) not in memo)
        for tensor in tensors_in(vars(module), seen):
            if id(tensor) in memo:
                continue
            memo[id(tensor)] = _sharing(tensor)
            # What hangs on a tensor (a quant_state) belongs to it and is shared with it.
            for value in getattr(tensor, "__dict__", {}).values():
                if not isinstance(value, nn.Module):
                    memo.setdefault(id(value), value)
    shells = {m: object.__new__(type(m)) for m in _plain_modules(model)}
    memo.update((id(m), shell) for m, shell in shells.items())
    try:
        for module, shell in shells.items():
            # Another thread may run the model for the first time meanwhile, so its attributes are listed first.
            vars(shell).update((k, _copied(v, memo)) for k, v in list(vars(module).items()) if k not in _LEFT_OUT)
        result = copy.deepcopy(model, memo)
    except TypeError as error:
        raise OftfxError(
            f"the structure of {type(model).__name__} cannot be copied: {error}. Use inplace=True, or "
            "remove that attribute"
        ) from error
    known = all(id(module) in memo for module in formats)  # not what a __deepcopy__ has made anew
    copies = [memo[id(module)] for module in formats] if known else list(result.modules())
    for module in copies:
        weight_format = format_of(module)
        if weight_format is not None:
            weight_format.own(module)
    return result


def _plain_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Buffers, and tensors that are attributes or in a list or a dict that is one."""
    found = list(module._buffers.values())
    for value in list(vars(module).values()):  # another thread may run the model for the first time meanwhile
        found += value if type(value) is list else value.values() if type(value) is dict else (value,)
    return [t for t in found if type(t) is torch.Tensor]


class _Owned:
    """Copies of what a forward may write into; tensors over the same memory stay so, also over a parameter's."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {place for p in model.parameters() if (place := _place(p))}
        counts = Counter(_place(b) for b in model.buffers())
        self._several = {place for place, count in counts.items() if count > 1}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a plain tensor, if it may be written into; otherwise the tensor itself."""
        if not (tensor.is_floating_point() or tensor.numel() < _MANY):
            return tensor
        place = _place(tensor)
        if place in self._parameters or not tensor.is_leaf:
            return tensor
        if not place or tensor.layout != torch.strided or not (place in self._several or 0 in tensor.stride()):
            result = tensor.detach().clone()
        else:
            storage = self._storages.setdefault(place, tensor.untyped_storage().clone())
            result = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            result.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        vars(result).update(vars(tensor))
        return result.requires_grad_(tensor.requires_grad)


def _place(tensor: torch.Tensor) -> int:
    """Address of a tensor's memory; 0 where it has none of its own."""
    try:
        return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass that is several tensors
        return 0


_MANY = 2**16
"""So many integers or booleans are packed weights or masks: nothing counts in them, and copies may double a model."""
_LEFT_OUT = ("_compiled_call_impl",)  # bound to the module that was compiled; nn.Module.__getstate__ drops it too
_ATOMS = (bool, int, float, str)
_CONTAINERS = (dict, OrderedDict, set)
_CUSTOMS = ("new", "deepcopy", "reduce_ex", "reduce", "getstate", "setstate", "getnewargs_ex", "getnewargs")


def _plain_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that ``copy.deepcopy`` would copy attribute by attribute, which is done faster here.

    What is inside a module with a way of its own stays to that way: it may use its children before it is done.
    """
    plain = {c: _is_plain(c) for c in {type(m) for m in model.modules()}}
    others = set[nn.Module]()
    for module in model.modules():
        if not plain[type(module)] and module not in others:
            others.update(module.modules())
    return [m for m in model.modules() if m not in others]


def _is_plain(cls: type[nn.Module]) -> bool:
    missing = object()
    own = (getattr(cls, f"__{n}__", missing) is not getattr(nn.Module, f"__{n}__", missing) for n in _CUSTOMS)
    return not any(own) and not any(vars(c).get("__slots__") for c in cls.__mro__)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """As ``copy.deepcopy``, which takes its time over the many empty dictionaries and sets of a module."""
    if value is None or type(value) in _ATOMS:
        return value
    if type(value) in _CONTAINERS and not value:
        return memo.setdefault(id(value), type(value)())
    return copy.deepcopy(value, memo)


def _sharing(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is not nn.Parameter:
        return tensor
    result = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    vars(result).update(vars(tensor))
    return result


def tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors reachable from a value without entering other modules; objects in ``seen`` are passed over, and added."""
    todo = [value]
    while todo:
        value = todo.pop()
        if value is None or type(value) in _ATOMS or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, (list, tuple, set)):
            todo += value
        elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
            todo.append(vars(value))


def is_own_module(module: nn.Module) -> bool:
    """Whether a module is one of ours (a rotation), which no rule ever reaches."""
    return type(module).__module__.startswith("oftfx.")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered; a layer may have several names."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def twin(module: nn.Module) -> nn.Module:
    """A shallow copy of a module and its children over the same parameter and buffer dictionaries.

    Mode and hooks are its own, so a graph may change its mode without changing the model's.
    """
    result = module.__class__.__new__(module.__class__)
    vars(result).update(vars(module))
    for name in HOOKS:
        vars(result)[name] = vars(module)[name].copy()
    result._modules = {k: None if c is None else twin(c) for k, c in module._modules.items()}
    return result
