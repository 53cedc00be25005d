"""A parameter that ``torch.nn.utils.parametrize`` computes, taken apart and put together again.

Torch gives a module with such parameters a class of its own, with a property for each, and copies of the module share
that class. Torch's own way to end a parametrization deletes the property from it, and all copies lose theirs.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch.nn.utils.parametrize import ParametrizationList

_CHILD = "parametrizations"
_OWN = ("__deepcopy__", "__getstate__", "__module__")


def parametrization_of(module: nn.Module, name: str) -> ParametrizationList | None:
    """What computes the parameter; None where nothing does. Computes nothing itself."""
    lists = module._modules.get(_CHILD)
    found = None if lists is None else lists._modules.get(name)
    return found if isinstance(found, ParametrizationList) else None


def parametrized_names(module: nn.Module) -> list[str]:
    """Names of a module's parameters that something computes."""
    lists = module._modules.get(_CHILD)
    return [] if lists is None else list(lists._modules)


def property_of(module: nn.Module, name: str) -> dict[str, Any]:
    """What `restore` needs of the class: the property, and what torch puts beside it."""
    known = vars(type(module))
    return {name: known[name], **{k: known[k] for k in _OWN if k in known}}


def replace_by(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """End the parametrization of one parameter of one module; copies keep theirs."""
    lists: Any = module._modules[_CHILD]
    kept = {k: v for k, v in vars(type(module)).items() if k != name}
    others = {k: v for k, v in lists._modules.items() if k != name}
    if others:  # in a new list: what shares the old one keeps it
        module._modules[_CHILD] = nn.ModuleDict(others).train(lists.training)
    else:
        del module._modules[_CHILD]
    _recast(module, kept if others else {})
    module._parameters[name] = parameter


def restore(module: nn.Module, name: str, computes: ParametrizationList, held: dict[str, Any]) -> None:
    """Inverse of `replace_by`; ``held`` is what `property_of` gave before it."""
    module._parameters.pop(name, None)
    lists = module._modules.get(_CHILD)
    kept = vars(type(module)) if lists is not None else {}
    if lists is None:
        module._modules[_CHILD] = lists = nn.ModuleDict().train(module.training)
    lists._modules[name] = computes
    _recast(module, {**held, **kept})


def _recast(module: nn.Module, members: Any) -> None:
    """Give a module the class that torch would have made for these properties."""
    cls = type(module)
    base = cls.__bases__[0] if cls.__module__ == "torch.nn.utils.parametrize" else cls
    skipped = ("__dict__", "__weakref__", "__doc__")
    own = {k: v for k, v in members.items() if k not in skipped}
    module.__class__ = type(f"Parametrized{base.__name__}", (base,), own) if own else base
