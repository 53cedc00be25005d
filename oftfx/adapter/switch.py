"""Add, name, switch and silence the adapters of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.fx as fx
import torch.nn as nn

from oftfx.adapter.store import AdapterStore, located
from oftfx.errors import AdapterError
from oftfx.placement.find import rotated_sites
from oftfx.planning.plans import Plan
from oftfx.rotation.module import Rotation


def set_adapter(model: nn.Module, adapter: str | Sequence[str] | None) -> None:
    """Choose which adapters act: one, several in a row (``x -> R1 -> R2 -> W``), or None for the base model.

    Which parameters require gradients does not change.

    Raises:
        AdapterError: an unknown name, or one named twice; a model without adapters, or a recorded graph.

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
    names = () if adapter is None else (adapter,) if isinstance(adapter, str) else tuple(adapter)
    store.require(*names)
    if len(set(names)) != len(names):
        raise AdapterError(f"an adapter is named twice in {list(names)}")
    store.activate(root, names)


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
    try:
        return {name: adapter.plan for name, adapter in located(model)[1].adapters.items()}
    except AdapterError:
        return {}


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act, in order.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3)}, adapter="news")
        >>> oftfx.active_adapters(model), oftfx.active_adapters(base)
        (('news',), ())
    """
    try:
        return located(model)[1].active
    except AdapterError:
        return ()


def remove_adapter(model: nn.Module, adapter: str) -> None:
    """Take an adapter out of a model, in place.

    Raises:
        AdapterError: an unknown name; a model without adapters, or a recorded graph.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3)}, adapter="news")
        >>> plan = oftfx.add_adapter(model, "code", {"*": oftfx.OFT(2)})
        >>> oftfx.remove_adapter(model, "news")
        >>> list(oftfx.adapters(model)), oftfx.active_adapters(model)
        (['code'], ())
    """
    root, store = switchable(model)
    store.require(adapter)
    store.remove(root, adapter)
    for _, placement in list(rotated_sites(root)):
        placement.drop(adapter)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model, inside a ``with``: no rotation acts, parameters trained whole have their base values.

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
    try:
        yield
    finally:
        store.activate(root, tuple(n for n in active if n in store.adapters))


def refresh(model: nn.Module) -> None:
    """Forget what eval mode has computed from parameters that were written into behind torch's back.

    Rotations and rotated weights are kept between forwards in eval mode until a version of a parameter changes, an
    optimiser steps, or the model moves or changes mode. Writing through ``.data`` changes no version: on a CPU most
    such writes are seen all the same (see `oftfx.Rotation`), on an accelerator none is.

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

    A skew is ``(blocks, b (b - 1) / 2)``, float32, or float64 for float64 weights; see `oftfx.Rotation`.

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
