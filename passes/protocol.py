"""What a pass is, what it returns, and what is held against it.

A pass declares three things and does one:

* ``name``: a verb phrase, used in errors and reports;
* ``preserves``: ``"exact"`` (bit for bit), ``"rounding"`` (equal up to float rounding) or ``"lossy"``;
* ``after``: names of passes that have to come earlier, if they are in the same pipeline at all;
* ``run(program)``: returns a `PassResult`. What it did, or refused to do and why, is data: one `Change` a site.

`PassManager` holds it to that: post-conditions are checked on the **result**, ``modified`` must be true exactly when
something changed, the order is checked before anything runs, and with ``verify`` the program is run before and after
each pass that is not lossy.

    class MyPass(Pass):
        name = "freeze_everything"
        preserves = "exact"

        def run(self, program):
            ...
            return PassResult(program, modified=True, changes=(Change("model.layers.0", "froze"),))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from oftfx.errors import PassError
from oftfx.model.running import outputs_of
from oftfx.planning.program import Program
from oftfx.precision import BOUNDS, pieces, relative_error

Preserves = Literal["exact", "rounding", "lossy"]


@dataclass(frozen=True)
class Change:
    """What a pass did to one site, or why it did not.

    Attributes:
        site: module path.
        action: what was done, or what was refused.
        reason: why it was refused or needs a remark; empty otherwise.
        refused: whether nothing was done.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import FoldRotations, Program
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> FoldRotations().run(Program.of(model)).changes
        (Change(site='0', action='folded', reason='', refused=False),)
    """

    site: str
    action: str
    reason: str = ""
    refused: bool = False


@dataclass(frozen=True)
class PassResult:
    """Outcome of a pass.

    Attributes:
        program: the one to go on with.
        modified: whether it differs.
        changes: what happened to each site.
        found: what else the pass has to say, of a type that it documents; of a manager, by the name of the pass.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import FindProducers, MatchRules, PassManager, Program
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
        >>> passes = [MatchRules([oftfx.Rule("1", oftfx.OFT(3))]), FindProducers()]
        >>> result = PassManager(passes).run(Program.of(model))
        >>> result.modified, [(change.site, change.reason) for change in result.refusals]
        (True, [('1', 'not recorded')])
    """

    program: Program
    modified: bool
    changes: tuple[Change, ...] = ()
    found: Any = None

    @property
    def refusals(self) -> tuple[Change, ...]:
        """The changes that were refused, each with its reason."""
        return tuple(c for c in self.changes if c.refused)


class Pass(ABC):
    """One transformation of a `Program`. See the module's text for the contract.

    Examples:
        >>> import torch
        >>> from oftfx.passes import Pass, PassManager, PassResult, Program
        >>> class CountSites(Pass):
        ...     name, preserves = "count_sites", "exact"
        ...     def run(self, program):
        ...         return PassResult(program, modified=False, found=len(program.sites))
        >>> PassManager([CountSites()]).run(Program.of(torch.nn.Sequential(torch.nn.Linear(6, 4)))).found
        {'count_sites': 1}
    """

    name: ClassVar[str]
    preserves: ClassVar[Preserves]
    after: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Do it."""

    def check(self, result: Program) -> None:  # noqa: B027  (a pass without post-condition is fine)
        """Raise `PassError` where the result is not what the pass stands for."""


@dataclass(frozen=True)
class PassManager:
    """Run passes in order and hold each to its contract.

    Args:
        passes: in the order they run.
        verify: keyword arguments or a tuple of inputs; the model is then run before and after every pass that is
            not lossy, and a difference beyond the bound names pass, output and error.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import InsertRotations, MatchRules, PassManager, Program
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4))
        >>> passes = [MatchRules([oftfx.Rule("1", oftfx.OFT(3))]), InsertRotations("news")]
        >>> result = PassManager(passes, verify=(torch.randn(5, 6),)).run(Program.of(model))
        >>> [(change.site, change.action) for change in result.changes]
        [('1', 'planned'), ('1', 'rotated')]
    """

    passes: Sequence[Pass]
    verify: Mapping[str, Any] | tuple[Any, ...] | None = None

    def run(self, program: Program) -> PassResult:
        """Run all passes.

        Raises:
            PassError: a pass is out of order, is not honest about ``modified``, breaks its post-condition or, with
                ``verify``, changes what the model computes.
        """
        self._check_order()
        modified, changes, found = False, list[Change](), dict[str, Any]()
        before = program.fingerprint() if self.passes else ()
        for step in self.passes:
            result, before = self._run_one(step, program, before)
            program, modified = result.program, modified or result.modified
            changes += result.changes
            if result.found is not None:
                found[step.name] = result.found
        return PassResult(program, modified, tuple(changes), found)

    def _run_one(self, step: Pass, program: Program, before: tuple[Any, ...]) -> tuple[PassResult, tuple[Any, ...]]:
        inputs = None if step.preserves == "lossy" else self.verify
        expected = [] if inputs is None else outputs_of(program.model, inputs)
        result = step.run(program)
        if not isinstance(result, PassResult):
            raise PassError(f"pass {step.name}: run() returned {type(result).__name__}, expected a PassResult")
        after = result.program.fingerprint()
        if (after != before) != result.modified:
            raise PassError(
                f"pass {step.name}: says modified={result.modified}, but the program "
                f"{'did not change' if result.modified else 'changed'}"
            )
        try:
            step.check(result.program)
        except PassError as error:
            raise PassError(f"pass {step.name}: post-condition failed: {error}") from error
        if inputs is not None:
            _compare(step, expected, outputs_of(result.program.model, inputs))
        return result, after

    def _check_order(self) -> None:
        names = [p.name for p in self.passes]
        for index, step in enumerate(self.passes):
            if late := [n for n in step.after if n in names[index:]]:
                raise PassError(f"pass {step.name} has to run after {late[0]}; order given: {', '.join(names)}")


def _compare(step: Pass, expected: list[torch.Tensor], got: list[torch.Tensor]) -> None:
    if len(expected) != len(got):
        raise PassError(f"pass {step.name}: the model had {len(expected)} outputs and has {len(got)} now")
    for index, (old, new) in enumerate(zip(expected, got, strict=True)):
        if old.shape != new.shape:
            raise PassError(f"pass {step.name}: output {index} had shape {tuple(old.shape)}, now {tuple(new.shape)}")
        if step.preserves == "exact" and not torch.equal(old, new):
            worst = max(float((a.double() - b.double()).abs().max()) for a, b in pieces(old, new))
            raise PassError(f"pass {step.name} promises exact outputs; output {index} differs by up to {worst:.3g}")
        if step.preserves == "rounding" and old.is_floating_point():
            error = relative_error(new, old)
            if not error <= BOUNDS[old.dtype]:
                raise PassError(
                    f"pass {step.name}: output {index} differs by a relative {error:.3g}, "
                    f"more than rounding ({BOUNDS[old.dtype]:g} for {old.dtype})"
                )
