"""What an adapter keeps of the base's tasks and gains for its own, over its strength."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch
import torch.nn as nn

from oftfx.adapter.store import AdapterStore
from oftfx.adapter.switch import remove_adapter, set_adapter, switchable
from oftfx.blending.blend import blend
from oftfx.blending.turns import rotations_of
from oftfx.errors import AdapterError
from oftfx.model.running import evaluating
from oftfx.placement.find import rotated_sites
from oftfx.terminal import render


@dataclass(frozen=True)
class RetentionPoint:
    """The scores at one strength.

    Attributes:
        strength: 0 is the base model, 1 the adapter as it is.
        scores: of each task.
    """

    strength: float
    scores: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class RetentionCurve:
    """Iterates over its points; ``curve["task"]`` are the scores of one task by strength, ``table()`` shows all.

    Attributes:
        adapter: whose.
        points: in the order that was asked for.

    Examples:
        >>> import oftfx, torch
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(5, 6)
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal", parameterization="cayley")})
        >>> curve = oftfx.retention(model, {"moved": lambda m: (m(x) - base(x)).norm()}, strengths=(0, 0.5, 1))
        >>> scores = curve["moved"]
        >>> scores[0.0], 0 < scores[0.5] < scores[1.0]
        (0.0, True)
    """

    adapter: str
    points: tuple[RetentionPoint, ...]

    def __iter__(self) -> Iterator[RetentionPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, task: str) -> dict[float, float]:
        return {p.strength: dict(p.scores)[task] for p in self.points}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name for name, _ in self.points[0].scores)

    def __str__(self) -> str:
        lines = (f"{p.strength:g}: " + ", ".join(f"{n} {s:.6g}" for n, s in p.scores) for p in self.points)
        return "\n".join((f"strength of {self.adapter}", *lines))

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, as text."""
        return [(f"{p.strength:g}", *(f"{score:.6g}" for _, score in p.scores)) for p in self.points]

    def table(self) -> str:
        """One row a strength (needs the ``report`` extra)."""
        return render(f"Retention of {self.adapter}", ("strength", *self.tasks), self.rows())

    def to_json(self) -> str:
        """All figures as JSON text."""
        return json.dumps(asdict(self), indent=1)


def retention(
    model: nn.Module,
    tasks: Mapping[str, Callable[[Any], Any]],
    strengths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    adapter: str = "default",
    bound: float = 0.01,
) -> RetentionCurve:
    """Score a model on several tasks while an adapter's strength grows: the base's tasks against the new one.

    At 0 the base model is scored, at 1 the adapter as it is, at others what `blend` makes of it with that weight. The
    model is in eval mode meanwhile, and records no gradients; modes, adapters and what requires gradients are as before
    afterwards, also after an exception.

    Args:
        model: a transformed model.
        tasks: functions that get ``model`` and return a number.
        strengths: in this order; also negative ones, or above 1.
        adapter: which one; it acts alone.
        bound: see `blend`.

    Raises:
        AdapterError: an unknown adapter; no task; something that is no number; a fold-aware adapter; see `blend`.

    Source: retention against adaptation over the strength of an update is PEFT-Arena's comparison, arXiv 2605.28819.

    Examples:
        >>> import oftfx, torch
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(5, 6)
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3)})
        >>> curve = oftfx.retention(model, {"base task": lambda m: m(x).sum()}, strengths=(0, 1))
        >>> len(curve), curve.tasks, oftfx.active_adapters(model)
        (2, ('base task',), ('default',))
    """
    root, store = switchable(model)
    if not isinstance(tasks, Mapping) or not tasks or not all(map(callable, tasks.values())):
        raise AdapterError(f"tasks: got {tasks!r}, expected functions by name, e.g. {{'base task': score}}")
    rotations_of(root, store, adapter)
    if any(adapter in names for _, placement in rotated_sites(root) for names in placement.through):
        raise AdapterError(
            f"adapter {adapter!r} is trained through its fold, and no other strength of it is; let the rotations act "
            "again first: oftfx.fold_aware(model, None)"
        )
    points = list[RetentionPoint]()
    with evaluating(root), _as_before(root, store):
        for strength in strengths:
            with _at(root, store, adapter, strength, bound), torch.no_grad():
                scores = tuple((name, _number(name, score(model))) for name, score in tasks.items())
            points.append(RetentionPoint(float(strength), scores))
    if not points:
        raise AdapterError("strengths: got none; expected some, e.g. (0, 0.5, 1)")
    return RetentionCurve(adapter, tuple(points))


@contextmanager
def _at(root: nn.Module, store: AdapterStore, adapter: str, strength: float, bound: float) -> Iterator[None]:
    """An adapter at a strength, alone, inside."""
    if strength in (0, 1):
        set_adapter(root, adapter if strength else None)
        yield
        return
    name = next(n for i in count() if (n := f"strength{i}") not in store.adapters)
    try:
        blend(root, {adapter: strength}, into=name, bound=bound)
        set_adapter(root, name)
        yield
    finally:
        if name in store.adapters:
            set_adapter(root, None)  # so that no other one takes its place
            remove_adapter(root, name)


@contextmanager
def _as_before(root: nn.Module, store: AdapterStore) -> Iterator[None]:
    """Whatever happens inside, the same adapters act afterwards, and the same parameters require gradients."""
    active, asked = store.active, {p: p.requires_grad for p in root.parameters()}
    whole = {p: p.requires_grad for own in store.trained.values() for p in own.values()}
    try:
        yield
    finally:
        store.activate(root, active)
        for parameter, wanted in {**whole, **asked}.items():
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)


def _number(task: str, score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError):
        raise AdapterError(f"task {task!r} returned a {type(score).__name__}, expected a number") from None
