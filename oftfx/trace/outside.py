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
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import warn
from oftfx.model.structure import HOOKS


class Outside:
    """Globals, class attributes and what the model and its functions hold, as they were before a recording.

    Args:
        model: it and its classes may keep something.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before: dict[int, tuple[Any, Any]] = {}  # each dict, list and set with what was in it
        self._cells: dict[int, tuple[types.CellType, Any]] = {}
        self._names: dict[int, str] = {}
        self._asked = self._undone = 0
        modules = list(model.modules())
        classes = {c for kind in {type(m) for m in modules} for c in kind.__mro__}
        self._classes = {c: dict(vars(c)) for c in classes}
        files = {n: vars(m) for n, m in list(sys.modules.items()) if isinstance(m, types.ModuleType) and _may_keep(n)}
        for scope in (*files.values(), *(d for m in modules for d in (vars(m), m._buffers))):
            self._note(scope)
        # What the model's own code can reach: its files with the classes in them, what hooks and functions hold.
        own = [files[f] for f in {str(c.__module__) for c in classes} if f in files]
        beside = {v for f in own for v in list(f.values()) if isinstance(v, type) and _may_keep(str(v.__module__))}
        self._classes.update((c, dict(vars(c))) for c in beside - classes)
        held = [v for m in modules for d in (vars(m), *(vars(m)[n] for n in HOOKS)) for v in list(d.values())]
        distinct = {id(v): v for v in held if type(v) not in _PLAIN}
        near = [v for f in (*own, *(self._classes[c] for c in beside)) for v in list(f.values())]
        functions = [v for v in distinct.values() if callable(v) or _is_object(v)]
        self._look_into([*near, *functions], depth=_NEAR, code=True)
        for scope in (*files.values(), *self._classes.values()):
            self._look_into(scope.values(), depth=_FAR, code=False)

    def _note(self, container: Any) -> None:
        self._before[id(container)] = container, container.copy()

    def _look_into(self, values: Iterable[Any], depth: int, *, code: bool) -> None:
        """Note containers among these values and in them; ``code``: also what functions and objects hold."""
        level = list(values)
        for _ in range(depth):
            inside: list[Any] = []
            for value in level:
                if type(value) in _CONTAINERS:
                    if id(value) not in self._before and len(value) < _LONG:
                        self._note(value)
                        inside += value.values() if isinstance(value, dict) else value
                elif not code:
                    continue
                elif isinstance(value, types.FunctionType):
                    cells = [c for c in value.__closure__ or () if id(c) not in self._cells]
                    found = {id(c): (c, c.cell_contents) for c in cells if _is_filled(c)}
                    self._cells.update(found)
                    inside += [content for _, content in found.values()]
                elif isinstance(value, types.MethodType):
                    inside += [value.__self__, value.__func__]
                elif isinstance(value, partial):
                    inside += [value.func, *value.args, *value.keywords.values()]
                elif _is_object(value):
                    attributes = _attributes(value) or {}
                    if id(attributes) not in self._before:
                        self._note(attributes)
                        inside += attributes.values()
            level = inside

    def restore(self, made: list[weakref.ref[torch.Tensor]], error: BaseException | None = None) -> None:
        """Take back what still holds fake tensors; nothing is looked for where none is alive.

        Args:
            made: the fake tensors of the recording.
            error: what it raised, which may keep some itself.

        A warning names what keeps one and cannot be made to let go of it.
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
            self._undone = 0
            kept = self._let_go(_living(made))
            if not self._undone:
                break  # nor would another round
        if not _living(made) or (error is not None and not kept):
            return  # what an error, or a log of it, holds is read by nobody's next call
        known = sorted(set(kept or self._names.values()))
        warn(
            "a recording runs the model's code on tensors without numbers (FakeTensor), and that code keeps "
            f"{len(_living(made))} of them: {'; '.join(known[:_SHOWN]) or 'in a place that Python does not show'}. If "
            "it reads them again, clear that place, and keep such a thing on the module or behind functools.lru_cache"
        )

    def _let_go(self, level: list[Any]) -> list[str]:
        """Take tensors out of what holds them, from owner to owner; gives what cannot be changed back."""
        seen = set(map(id, level))
        kept: list[str] = []
        self._asked = 0
        most = max(len(level), _WIDE)
        while level and len(level) <= most and len(seen) < _MANY:
            above: list[Any] = []
            by_id = {id(v): v for v in level}
            for owner in gc.get_referrers(*level):
                if owner is level or owner is by_id or id(owner) in seen or _is(owner, *_PASSING):
                    continue
                held = [by_id[i] for i in set(map(id, gc.get_referents(owner))) if i in by_id]
                undone = self._undo(owner, held)
                if undone is None:
                    seen.add(id(owner))
                    above.append(owner)
                elif undone:
                    kept.append(undone)
                else:
                    self._undone += 1
            level = above
        return kept

    def _undo(self, owner: Any, held: list[Any]) -> str | None:
        """Make ``owner`` let go: "" where it did, else a name for it; None where it is a part of something itself."""
        if _is_cache(owner):
            return self._clear(owner, held)
        if id(owner) in self._before:
            return self._bring_back(owner, self._before[id(owner)][1], held)
        name = next((n for v in held if (n := self._names.get(id(v)))), "")
        if type(owner) is types.CellType:
            name = name or "a variable of an enclosing function"
            if id(owner) in self._cells:
                before = self._cells[id(owner)][1]
                unchanged = any(before is h for h in held)
                owner.cell_contents = before
                return name if unchanged else ""
        for holder in self._holders(owner) if type(owner) in _CONTAINERS else ():
            if _is_cache(holder):
                return self._clear(holder, held)
            if _is(holder, type) and holder in self._classes:
                return self._bring_back(holder, self._classes[holder], held)
            if type(holder) is types.FrameType:
                return ""  # its local variables
            if _attributes(holder) is owner or _is(holder, type):
                name = name or _named(owner, held, holder)
        if attributes := _attributes(owner):
            name = name or _named(attributes, held, owner)
        if name:
            self._names[id(owner)] = name
        return None

    def _holders(self, owner: Any) -> list[Any]:
        """What refers to a container; each time the whole process is looked through, so not without end."""
        self._asked += 1
        return gc.get_referrers(owner) if self._asked < _SEARCHES else []

    def _clear(self, cache: Any, held: list[Any]) -> str:
        """Clear a cache of results; one of objects, which may have a state, is only named."""
        if any(_is_object(value) for value in held):
            return f"an object that {getattr(cache, '__qualname__', 'a cache')} keeps"
        cache.cache_clear()
        return ""

    def _bring_back(self, owner: Any, before: Any, held: list[Any]) -> str:
        """What holds values as it was; a name where the very object that was there has changed inside."""
        changed = []
        if isinstance(owner, (list, set)):
            was = set(map(id, before))
            changed = [self._names.get(id(h), "an object in a container") for h in held if id(h) in was]
            gone = {id(h) for h in held if id(h) not in was}
            if isinstance(owner, set):
                owner.difference_update([v for v in owner if id(v) in gone])
            elif len(owner) == len(before):
                owner[:] = [b if id(v) in gone else v for v, b in zip(owner, before, strict=True)]
            else:
                owner[:] = [v for v in owner if id(v) not in gone]
            return " and ".join(changed)
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
_MANY, _SEARCHES = 1000, 30  # owners, and how often all of the process is searched for theirs
_WIDE = 30  # owners of one level: more are no longer who keeps it, but who imports them
_LONG = 1000  # tables of names, not registries of caches
_NEAR, _FAR = 4, 2  # how deep
_PASSING = (types.FrameType, BaseException)
_PLAIN = {bool, int, float, str, tuple, list, dict, set, OrderedDict, type(None), type}
_CONTAINERS = {dict, OrderedDict, defaultdict, list, set}
_NEVER = sys.stdlib_module_names | {"torch", "sympy", "numpy"}


def _may_keep(module: str) -> bool:
    package = module.partition(".")[0]
    return package == "__main__" or package not in _NEVER


def _values(owner: Any) -> dict[Any, Any]:
    return dict(vars(owner) if isinstance(owner, type) else owner)


def _named(attributes: dict[Any, Any], held: list[Any], owner: Any) -> str:
    names = [str(k) for k, v in list(attributes.items()) if any(v is h for h in held)]
    of = owner if _is(owner, type) else type(owner)
    return f"{' and '.join(names)} of a {of.__module__}.{of.__qualname__}" if names else ""


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _is_object(value: Any) -> bool:
    """Whether a value is an object with attributes, of a class of somebody's."""
    kind = type(value)
    if issubclass(kind, (nn.Module, torch.Tensor, types.ModuleType, type)):
        return False
    if str(kind.__module__).partition(".")[0] in _NEVER - {"types"}:  # a SimpleNamespace may hold anything
        return False
    return _attributes(value) is not None


# What refers to a tensor may be anything of the process: nothing below runs code of its class, as `isinstance`,
# `hasattr` and a look at its attributes may.


def _is(value: Any, *kinds: type) -> bool:
    return issubclass(type(value), kinds)


def _attributes(value: Any) -> dict[Any, Any] | None:
    try:
        found = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return None
    return found if type(found) is dict else None


def _is_cache(owner: Any) -> bool:
    """Whether it is made by ``functools.lru_cache``, or a function with the same methods."""
    own = _attributes(owner) if type(owner) is types.FunctionType else None
    known = {*dir(type(owner)), *(own or ())} if own or type(owner).__module__ == "functools" else ()
    return "cache_clear" in known and "cache_info" in known


def _living(made: list[weakref.ref[torch.Tensor]]) -> list[torch.Tensor]:
    return list({id(t): t for ref in made if (t := ref()) is not None}.values())
