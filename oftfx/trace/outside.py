"""What a recording leaves outside the copy that it runs: fake tensors in places that others share, found and undone.

A model's own code may keep what it computes: in a ``functools.lru_cache``, a global of its file, an attribute of its
class. A recording computes fake tensors, and whoever reads such a place afterwards, the model too, would get one.
"""

from __future__ import annotations

import gc
import sys
import traceback
import types
import weakref
from collections import OrderedDict, defaultdict
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import LeftOutsideError


class Outside:
    """Globals, class attributes and attributes of a model as they were before a recording.

    Args:
        model: it and its classes may keep something.
    """

    def __init__(self, model: nn.Module) -> None:
        files = [vars(m) for n, m in list(sys.modules.items()) if isinstance(m, types.ModuleType) and _may_keep(n)]
        own = [d for m in model.modules() for d in (vars(m), m._buffers)]
        self._before = {id(d): (d, dict(d)) for d in (*files, *own)}
        self._classes = {c: dict(vars(c)) for cls in {type(m) for m in model.modules()} for c in cls.__mro__}
        scopes = [*files, *self._classes.values()]
        self._containers = {id(v): v for scope in scopes for v in list(scope.values()) if type(v) in _CONTAINERS}
        for container in [c for c in self._containers.values() if len(c) < _LONG]:
            items = container.values() if isinstance(container, dict) else container
            self._containers.update((id(v), v) for v in list(items) if type(v) in _CONTAINERS)
        self._names: dict[int, str] = {}

    def restore(self, made: list[weakref.ref[torch.Tensor]], error: BaseException | None = None) -> None:
        """Take back what still holds fake tensors; nothing is looked for where none is alive.

        Args:
            made: the fake tensors of the recording.
            error: what it raised, which may keep some itself.

        Raises:
            LeftOutsideError: something keeps one that cannot be made to let go of it.
        """
        raised = error
        while raised is not None:
            traceback.clear_frames(raised.__traceback__)
            raised = raised.__cause__ or raised.__context__
        kept: list[str] = []
        for _ in range(_ROUNDS):
            if not _living(made):
                return
            gc.collect()  # modules that know each other are circles
            kept = self._let_go(_living(made))
        if not _living(made) or (error is not None and not kept):
            return  # what an error, or a log of it, holds is read by nobody's next call
        known = sorted(set(kept or self._names.values()))
        where = "; ".join(known[:_SHOWN]) or "a place that Python does not show"
        raise LeftOutsideError(
            "a recording runs the model's code on tensors without numbers, and that code keeps some for its next call: "
            f"{where}. Keep them on the module instead (an attribute or a buffer), or behind functools.lru_cache, "
            "which is cleared"
        )

    def _let_go(self, level: list[Any]) -> list[str]:
        """Take tensors out of what holds them, from owner to owner; gives what cannot be changed back."""
        seen = set(map(id, level))
        kept: list[str] = []
        while level:
            above: list[Any] = []
            by_id = {id(v): v for v in level}
            for owner in gc.get_referrers(*level):
                if owner is level or owner is by_id or id(owner) in seen or isinstance(owner, _PASSING):
                    continue
                held = [by_id[i] for i in set(map(id, gc.get_referents(owner))) if i in by_id]
                undone = self._undo(owner, held)
                if undone is None:
                    seen.add(id(owner))
                    above.append(owner)
                elif undone:
                    kept.append(undone)
            level = above
        return kept

    def _undo(self, owner: Any, held: list[Any]) -> str | None:
        """Make ``owner`` let go: "" where it did, else a name for it; None where it is a part of something itself."""
        if _is_cache(owner):
            owner.cache_clear()
            return ""
        if id(owner) in self._before:
            return self._bring_back(owner, self._before[id(owner)][1], held)
        if id(owner) in self._containers:
            _remove(owner, held)
            return ""
        name = next((n for v in held if (n := self._names.get(id(v)))), "")
        if isinstance(owner, types.CellType):
            name = name or "a variable of an enclosing function"
        for holder in gc.get_referrers(owner) if isinstance(owner, dict) else ():
            if _is_cache(holder):
                holder.cache_clear()
                return ""
            if isinstance(holder, type) and holder in self._classes:
                return self._bring_back(holder, self._classes[holder], held)
            if isinstance(holder, types.FrameType):
                return ""  # its local variables
            if getattr(holder, "__dict__", None) is owner or isinstance(holder, type):
                name = name or _named(owner, held, holder)
        if getattr(owner, "__dict__", None):
            name = name or _named(vars(owner), held, owner)
        if name:
            self._names[id(owner)] = name
        return None

    def _bring_back(self, owner: Any, before: dict[Any, Any], held: list[Any]) -> str:
        """Globals or attributes as they were; a name where the very object that was there has changed inside."""
        changed = []
        for key, value in [i for i in _values(owner).items() if any(i[1] is h for h in held)]:
            if key in before and before[key] is value:
                changed.append(self._names.get(id(value), str(key)))
            elif isinstance(owner, type):
                setattr(owner, key, before[key]) if key in before else delattr(owner, key)
            elif key in before:
                owner[key] = before[key]
            else:
                del owner[key]
        return " and ".join(changed)


_ROUNDS, _SHOWN = 3, 3
_LONG = 1000  # tables of names, not registries of caches
_PASSING = (types.FrameType, BaseException)
_CONTAINERS = {dict, OrderedDict, defaultdict, list, set}
_NEVER = sys.stdlib_module_names | {"torch", "sympy", "numpy"}


def _may_keep(module: str) -> bool:
    package = module.partition(".")[0]
    return package == "__main__" or package not in _NEVER


def _values(owner: Any) -> dict[Any, Any]:
    return dict(vars(owner) if isinstance(owner, type) else owner)


def _named(attributes: Any, held: list[Any], owner: Any) -> str:
    names = [str(k) for k, v in list(attributes.items()) if any(v is h for h in held)]
    of = owner if isinstance(owner, type) else type(owner)
    return f"{' and '.join(names)} of a {of.__module__}.{of.__qualname__}" if names else ""


def _remove(container: Any, held: list[Any]) -> None:
    if isinstance(container, dict):
        for key in [k for k, v in list(container.items()) if any(v is h for h in held)]:
            del container[key]
    elif isinstance(container, list):
        container[:] = [v for v in container if not any(v is h for h in held)]
    else:
        container.difference_update(held)


def _is_cache(owner: Any) -> bool:
    return not isinstance(owner, type) and hasattr(owner, "cache_clear") and hasattr(owner, "cache_info")


def _living(made: list[weakref.ref[torch.Tensor]]) -> list[torch.Tensor]:
    return list({id(t): t for ref in made if (t := ref()) is not None}.values())
