"""Add, name, switch and silence the adapters of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch.fx as fx
import torch.nn as nn

from oftfx.adapter.store import AdapterStore, located
from oftfx.errors import AdapterError, warn
from oftfx.placement.find import rotated_sites
from oftfx.placement.rows import OPEN, Rows, check_no_rows, with_rows
from oftfx.planning.plans import Plan


def set_adapter(model: nn.Module, adapter: str | Sequence[str] | None, *, trainable: bool | None = None) -> None:
    """Choose which adapters act: one, several in a row (``x -> R1 -> R2 -> W``), or None for the base model.

    Parameters of the adapters that act require gradients, those of the others do not, as in PEFT. An adapter that was
    made not to train (`load_adapter` without ``trainable=True``, a configuration with ``inference_mode=True``) does not
    begin to.

    Args:
        model: a transformed model.
        adapter: a name, several, or None.
        trainable: whether the adapters that are named train from now on; None leaves that as it is.

    Raises:
        AdapterError: an unknown name, one named twice, or two adapters that train the same module whole.
    """
    root, store = switchable(model)
    check_no_rows(root, "set_adapter")
    names = store.together(() if adapter is None else (adapter,) if isinstance(adapter, str) else tuple(adapter))
    for name in names if trainable is not None else ():
        store.set_trainable(name, bool(trainable))
    store.activate(root, names)
    store.follow(root)


def adapters(model: nn.Module) -> dict[str, Plan]:
    """The adapters of a model by name, each with its plan; empty for a model that was never transformed."""
    try:
        return {name: adapter.plan for name, adapter in located(model)[1].adapters.items()}
    except AdapterError:
        return {}


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act, in order."""
    try:
        return located(model)[1].active
    except AdapterError:
        return ()


def remove_adapter(model: nn.Module, adapter: str) -> None:
    """Take an adapter out of a model, in place.

    Where it was the only one that acted, the first of those that are left by name acts instead, with a warning; that is
    what PEFT does.

    Raises:
        AdapterError: an unknown name.
    """
    root, store = switchable(model)
    store.require(adapter)
    check_no_rows(root, "remove_adapter")
    acted = store.active
    store.remove(root, adapter)
    for _, placement in list(rotated_sites(root)):
        placement.drop(adapter)
    if acted == (adapter,):
        _let_another_act(root, store, adapter)


def _let_another_act(root: nn.Module, store: AdapterStore, removed: str) -> None:
    for name in sorted(store.adapters)[:1]:
        store.activate(root, (name,))
        store.follow(root)
        warn(f"adapter {removed!r} acted and was removed; {name!r} acts now. set_adapter(model, None) gives the base")


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model, inside a ``with``: no rotation acts, what trains whole has its base values.

    Also inside `adapter_rows`: of the two, the inner one holds.
    """
    root, store = switchable(model)
    active = store.active
    store.activate(root, ())
    placements = [p for _, p in rotated_sites(root)]
    try:
        with with_rows(Rows(placements, None)) if OPEN.any else nullcontext():
            yield
    finally:
        left = tuple(n for n in active if n in store.adapters)
        store.activate(root, left)
        if active and not left:
            _let_another_act(root, store, active[0])


def adapter_parameters(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """Parameters of one adapter, or of all that act: skews first, then what trains whole. For an optimiser.

    Raises:
        AdapterError: an unknown name.
    """
    root, store = located(model)
    names = store.active if adapter is None else (adapter,)
    store.require(*names)
    found: dict[int, nn.Parameter] = {}
    for name in names:
        for parameter in [*(r.skew for r in store.rotations(root, name)), *store.parameters((name,))]:
            found.setdefault(id(parameter), parameter)
    return list(found.values())


def switchable(model: nn.Module) -> tuple[nn.Module, AdapterStore]:
    """The root of a transformed model and its store, where its adapters can be switched.

    Raises:
        AdapterError: a recorded graph, or a model without adapters.
    """
    if isinstance(model, fx.GraphModule):
        raise AdapterError(
            "a recorded graph computes with the adapters it was recorded with; switch them in the model (graph.eager) "
            "and record again"
        )
    return located(model)
