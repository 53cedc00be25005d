"""See that nothing but the layers themselves reads the weights that a fold changes."""

from __future__ import annotations

from collections.abc import Sequence

from oftfx.errors import FoldError
from oftfx.passes.find_functional import FindFunctional
from oftfx.passes.protocol import Pass, PassResult
from oftfx.placement.find import rotated_sites
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program
from oftfx.trace.inputs import ExampleInputs, names_inputs
from oftfx.trace.record import record_best


class CheckReaders(Pass):
    """Look for code that reads a rotated layer's weight past the layer: it sees ``W`` now and ``W'`` after a fold.

    Plans that were made from a recording have ruled that out. Otherwise the program is recorded here, on ``inputs`` or
    on those that the model names itself. ``found`` says why it could not be; empty where it was, or needed not be.

    Args:
        plans: by which the rotations were inserted.
        inputs: of the model.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import CheckReaders, Program
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3)})
        >>> plans = list(oftfx.adapters(model).values())
        >>> CheckReaders(plans).run(Program.of(model)).found[:39]
        'no inputs to record the program with (c'
        >>> CheckReaders(plans, (torch.randn(5, 6),)).run(Program.of(model)).found
        ''
    """

    name = "check_readers"
    preserves = "exact"
    after = ("insert_rotations",)

    def __init__(self, plans: Sequence[Plan], inputs: ExampleInputs = None) -> None:
        self.plans, self.inputs = tuple(plans), inputs

    def run(self, program: Program) -> PassResult:
        """Record, where nobody has, and compare.

        Raises:
            FoldError: other code reads the weight of a rotated layer.
        """
        if all(plan.trace.rung != "tree" for plan in self.plans):
            return PassResult(program, False, found="")
        if self.inputs is None and not names_inputs(program.model):
            why = "no inputs to record the program with (calibration=[inputs], or transform(example_inputs=...))"
            return PassResult(program, False, found=why)
        recording = record_best(program.model, self.inputs, bare=True)
        if recording.rung == "tree":
            return PassResult(program, False, found=recording.reason)
        seen = FindFunctional().run(program.with_(recording=recording)).program
        sites = {s.fqn: s for s in seen.sites}
        for fqn, placement in rotated_sites(program.model):
            reason = seen.refused.get(fqn, "")
            if not reason and placement.reader is placement.module and fqn in sites and not sites[fqn].is_layer:
                reason = f"it is never called, and its weight is read in {sites[fqn].called or 'the model itself'}"
            if reason:
                raise FoldError(
                    f"{fqn}: {reason}. Folding it would change what that code computes; exclude it by a rule, with "
                    "example_inputs= in transform, which says so at once"
                )
        return PassResult(program, False, found="")
