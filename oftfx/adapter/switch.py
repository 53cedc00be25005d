"""Add, name, switch and silence the adapters of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch.fx as fx
import torch.nn as nn

from oftfx.adapter.store import AdapterStore, find_store, located
from oftfx.errors import AdapterError, warn
from oftfx.placement.find import rotated_sites
from oftfx.placement.rows import OPEN, Rows, check_no_rows, with_rows
from oftfx.placement.torch_private import forget_compiled
from oftfx.planning.plans import Plan
from oftfx.rotation.module import Rotation


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

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3)}, adapter="news")
        >>> plan = oftfx.add_adapter(model, "code", {"*": oftfx.OFT(2)})
        >>> oftfx.set_adapter(model, ["news", "code"])
        >>> oftfx.active_adapters(model)
        ('news', 'code')
    """
    root, store = switchable(model)
    check_no_rows(root, "set_adapter")
    names = store.together(() if adapter is None else (adapter,) if isinstance(adapter, str) else tuple(adapter))
    for name in names if trainable is not None else ():
        store.set_trainable(name, bool(trainable))
    store.activate(root, names)
    store.follow(root)


def adapters(model: nn.Module) -> dict[str, Plan]:
    """The adapters of a model by name, each with its plan; empty for a model that was never transformed.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3)}, adapter="news")
        >>> plan = oftfx.add_adapter(model, "code", {"*": oftfx.OFT(2)})
        >>> {name: plan["0"].block_size for name, plan in oftfx.adapters(model).items()}
        {'news': 3, 'code': 2}
    """
    store = find_store(model)
    return {} if store is None else {name: adapter.plan for name, adapter in store.adapters.items()}


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act, in order.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3)}, adapter="news")
        >>> oftfx.active_adapters(model), oftfx.active_adapters(base)
        (('news',), ())
    """
    store = find_store(model)
    return () if store is None else store.active


def remove_adapter(model: nn.Module, adapter: str) -> None:
    """Take an adapter out of a model, in place.

    Where it was the only one that acted, the first of those that are left by name acts instead, with a warning; that is
    what PEFT does.

    Raises:
        AdapterError: an unknown name; a model without adapters, or a recorded graph.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3)}, adapter="news")
        >>> plan = oftfx.add_adapter(model, "code", {"*": oftfx.OFT(2)})
        >>> oftfx.set_adapter(model, "code")
        >>> oftfx.remove_adapter(model, "news")
        >>> list(oftfx.adapters(model)), oftfx.active_adapters(model)
        (['code'], ('code',))
    """
    root, store = switchable(model)
    store.require(adapter)
    check_no_rows(root, "remove_adapter")
    acted = store.active
    store.remove(root, adapter)
    for _, placement in list(rotated_sites(root)):
        placement.drop(adapter)
    forget_compiled()
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

    Raises:
        AdapterError: a model without adapters, or a recorded graph.

    Examples:
        >>> import oftfx, torch
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(5, 6)
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> with oftfx.disable_adapters(model):
        ...     print(torch.equal(model(x), base(x)))
        True
        >>> torch.equal(model(x), base(x))
        False
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


def refresh(model: nn.Module) -> None:
    """Forget what eval mode has computed from parameters that were written into behind torch's back.

    Rotations and rotated weights are kept between forwards in eval mode until a version of a parameter changes, an
    optimiser steps, or the model moves or changes mode. Writing through ``.data`` changes no version: on a CPU most
    such writes are seen all the same (see `oftfx.Rotation`), on an accelerator none is.

    A CUDA graph (`torch.cuda.graph`, ``torch.compile(mode="reduce-overhead")``) runs no Python when it is replayed, so
    nothing is looked at then. What its replays read is written anew after each step of an optimiser, by
    ``load_state_dict`` and where the mode changes; after any other change, also by ``copy_``, call this before the next
    replay. After another adapter, a move or ``load_state_dict(assign=True)``, capture a new graph.

    Examples:
        >>> import oftfx, torch
        >>> x, model = torch.randn(5, 6), torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(model, {"*": oftfx.OFT(3)}).eval().requires_grad_(False)
        >>> before = model(x)
        >>> for parameter in oftfx.adapter_parameters(model):
        ...     parameter.data[0] += 0.1
        >>> oftfx.refresh(model)
        >>> torch.allclose(model(x), before)
        False
    """
    for module in model.modules():
        if isinstance(module, Rotation):
            module.forget()
    for _, placement in rotated_sites(model):
        placement.forget()


def adapter_parameters(model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """Parameters of one adapter, or of all that act: skews first, then what trains whole. For an optimiser.

    A skew is ``(blocks, b (b - 1) / 2)``, float32, or float64 for float64 weights; see `oftfx.Rotation`. Where scales
    train instead (`oftfx.fold_aware` with ``"calibrate"``), their ``shift (groups,)``, float32, takes the skew's place.

    Raises:
        AdapterError: an unknown name, or a model without adapters.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
        >>> model = oftfx.transform(base, {"0": oftfx.OFT(3)}, train=["1"])
        >>> [tuple(parameter.shape) for parameter in oftfx.adapter_parameters(model)]
        [(2, 3), (4, 9), (4,)]
    """
    root, store = located(model)
    names = store.active if adapter is None else (adapter,)
    store.require(*names)
    found: dict[int, nn.Parameter] = {}
    still = set[int]()
    for _, placement in rotated_sites(root):
        aware = placement.through.get(tuple(n for n in names if n in placement.rotations))
        found.update((id(p), p) for p in (() if aware is None else aware.parameters()))
        still |= {id(placement.rotations[n].skew) for n in (() if aware is None or aware.turns else aware.names)}
    for name in names:
        skews = [r.skew for r in store.rotations(root, name) if id(r.skew) not in still]
        for parameter in [*skews, *store.parameters((name,))]:
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
