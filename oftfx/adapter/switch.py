"""Add, name, switch and silence the adapters of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.fx as fx
import torch.nn as nn

from oftfx.adapter.store import AdapterStore, check_name, located
from oftfx.errors import AdapterError, RuleError
from oftfx.placement import rotated_sites
from oftfx.plans import Plan
from oftfx.rules import Rules
from oftfx.trace.inputs import ExampleInputs


def add_adapter(
    model: nn.Module,
    name: str,
    rules: Rules | Plan,
    *,
    example_inputs: ExampleInputs = None,
    train: Sequence[str] = (),
    train_bias: str = "none",
    trainable: bool = True,
) -> Plan:
    """Add a further adapter to a transformed model, in place; it does not act until `set_adapter` names it.

    Args:
        model: a transformed model.
        name: its name.
        rules: see `oftfx.plan`.
        example_inputs: see `oftfx.plan`.
        train: see `oftfx.plan`.
        train_bias: see `oftfx.plan`.
        trainable: whether its parameters require gradients.

    Returns:
        The plan that was carried out.

    Raises:
        AdapterError: the model was never transformed, or has an adapter of that name.
        RuleError: see `oftfx.plan`.
    """
    from oftfx.surgery import _planned, insert

    check_name(name)
    root, store = _switchable(model)
    if name in store.adapters:
        raise AdapterError(f"the model already has an adapter {name!r}; it has {', '.join(store.adapters)}")
    with disable_adapters(root):  # a recording would show rotations of their own in front of sites that read the same
        planned = _planned(root, rules, example_inputs, train, train_bias, trace=False)
    if not planned.program.plan:
        raise RuleError("no site is left to rotate: every rule is optional or excludes what it matches")
    insert(root, planned.program, name, trainable=trainable)
    store.activate(root, store.active)
    return planned.program.plan


def set_adapter(model: nn.Module, name: str | Sequence[str] | None) -> None:
    """Choose which adapters act: one, several in a row (``x -> R1 -> R2 -> W``), or None for the base model.

    Which parameters require gradients does not change.

    Raises:
        AdapterError: an unknown name, or one named twice.
    """
    root, store = _switchable(model)
    names = () if name is None else (name,) if isinstance(name, str) else tuple(name)
    store.require(*names)
    if len(set(names)) != len(names):
        raise AdapterError(f"an adapter is named twice in {list(names)}")
    store.activate(root, names)


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


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter out of a model, in place.

    Raises:
        AdapterError: an unknown name.
    """
    root, store = _switchable(model)
    store.require(name)
    store.remove(root, name)
    for _, placement in list(rotated_sites(root)):
        placement.drop(name)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """The base model, inside a ``with``: no rotation acts, parameters trained whole have their base values."""
    root, store = _switchable(model)
    active = store.active
    store.activate(root, ())
    try:
        yield
    finally:
        store.activate(root, tuple(n for n in active if n in store.adapters))


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


def _switchable(model: nn.Module) -> tuple[nn.Module, AdapterStore]:
    if isinstance(model, fx.GraphModule):
        raise AdapterError(
            "a recorded graph computes with the adapters it was recorded with; switch them in the model (graph.eager) "
            "and record again"
        )
    return located(model)
