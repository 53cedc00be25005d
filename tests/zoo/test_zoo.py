"""Every architecture, rotated at every site of every kind, against definitions that are not the library's own."""

from __future__ import annotations

import re
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

import oftfx
from oftfx.errors import TraceError
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.checks import EFFECT, FOLD, RUNGS, Subject, gradient_bound

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # from diffusers, on import


def accounted(subject: Subject) -> None:
    """Every layer that runs and every raw weight is rotated, or skipped with a reason."""
    assert subject.unaccounted() == []
    assert len({e.fqn for e in subject.plan}) == len(subject.plan)
    assert not {e.fqn for e in subject.plan} & {s.fqn for s in subject.plan.skipped}


def coverage(subject: Subject) -> None:
    """Nothing is skipped that could be rotated, and the plan counts its bytes right."""
    assert subject.unexpectedly_skipped() == {}
    assert subject.plan.coverage.share == pytest.approx(subject.coverage())


def identity(subject: Subject) -> None:
    """Before training the outputs are exactly the base model's."""
    assert subject.identity()
    assert subject.distance_from_base() < 1e-6


def gradients(subject: Subject) -> None:
    """Every trainable parameter gets the gradient that the dense reference gives it, and none is idle."""
    found = subject.gradients()
    bound = gradient_bound(subject.arch)
    assert {n: e for n, e in found.errors.items() if not e <= bound} == {}
    assert found.without_effect == ()
    assert found.errors


def reference(subject: Subject) -> None:
    """The outputs are those of the dense reference."""
    assert subject.distance_from_reference() < FOLD


def fold(subject: Subject) -> None:
    """Folded equals unfolded, also at another size, and the adapter does something that could have been lost."""
    same, other = subject.fold_errors()
    assert same < FOLD
    assert other < FOLD
    assert subject.effect() > EFFECT
    assert list(subject.folded.state_dict()) == list(subject.base.state_dict())


def unfold(subject: Subject) -> None:
    """A fold can be undone."""
    assert subject.unfolds()


def graph(subject: Subject) -> None:
    """The recorded graph, rotations as nodes, computes what the model computes; where there is none, it is said why."""
    if subject.arch.rung == "graph":
        assert subject.graph_error() < FOLD
        return
    reason = subject.plan.trace.reason.removeprefix("fake values: ").split("; ")[0]
    assert reason
    with pytest.raises(TraceError, match=re.escape(reason)):
        oftfx.graph(subject.adapted, subject.inputs)


def carried(subject: Subject) -> None:
    """A plan means the same wherever it is carried out."""
    assert subject.carries_out()


def saved(subject: Subject) -> None:
    """An adapter survives its file."""
    with tempfile.TemporaryDirectory() as directory:
        assert subject.saves(Path(directory))


def disabled(subject: Subject) -> None:
    """An adapter can be switched off."""
    assert subject.disables()


def names(subject: Subject) -> None:
    """Parameters of the base keep their names, new ones say what they are, a base state_dict loads."""
    assert subject.renamed() == []
    assert subject.loads_base()


def copies(subject: Subject) -> None:
    """A deep copy has rotations of its own."""
    assert subject.copies_are_independent()


def base(subject: Subject) -> None:
    """The model that was transformed is as it was."""
    assert subject.base_is_untouched()


def rung(subject: Subject) -> None:
    """The program is recorded as well as it can be, and where that is not whole the plan says why."""
    trace = subject.plan.trace
    assert RUNGS.index(trace.rung) >= RUNGS.index(subject.arch.rung), trace.reason
    assert bool(trace.reason) == (trace.rung != "graph")
    assert trace.nodes > 0
    assert not set(subject.executed) & set(trace.never_called)


CHECKS = {
    c.__name__: c
    for c in (
        accounted, coverage, identity, gradients, reference, fold, unfold, graph, carried, saved, disabled, names,
        copies, base, rung,
    )
}  # fmt: skip


@lru_cache(maxsize=1)
def _subject(name: str) -> Subject:
    return Subject(ARCHITECTURES[name])


def _cases() -> list:
    return [
        pytest.param(name, check, id=f"{name}-{check}", marks=pytest.mark.needs(*arch.packages))
        for name, arch in ARCHITECTURES.items()
        for check in CHECKS
    ]


@pytest.mark.parametrize(("name", "check"), _cases())
def test_zoo(name: str, check: str) -> None:
    CHECKS[check](_subject(name))


def test_the_zoo_is_large_and_varied():
    assert len(ARCHITECTURES) >= 40
    assert len({a.family for a in ARCHITECTURES.values()}) == 10
