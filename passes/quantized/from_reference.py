"""Make a quantized weight anew from the original float one, rotated."""

from __future__ import annotations

from oftfx.folding.policies import Budget
from oftfx.folding.record import SiteFold
from oftfx.folding.reference import ReferenceWeights
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.passes.quantized.policy import QuantizedPolicy, check_finite_inputs, rounded, write_rounded


class FromReference(QuantizedPolicy):
    """``quantized="reference"``: ``W @ blockdiag(R)^T`` of the original ``W``, rounded into the format.

    For adapters that were trained on the float model.

    Args:
        reference: the original weights.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats.bnb8 import make_linear8bit
        >>> original = torch.nn.Sequential(torch.nn.Linear(66, 10))
        >>> base = torch.nn.Sequential(make_linear8bit(original[0]))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> report = oftfx.fold(model, quantized="reference", reference=original).report
        >>> [(site.fqn, site.action, site.relative_error < 0.02) for site in report]
        [('0', 'from reference', True)]
    """

    name = "from_reference"
    preserves = "lossy"

    def __init__(self, reference: ReferenceWeights) -> None:
        self.reference = reference

    def fold(self, site: Turned, bench: Workbench, shown: Shown | None, bound: Budget | None) -> SiteFold | None:  # noqa: ARG002
        """Rotate the original and round it, compensated where moments are known."""
        wanted = site.turned(self.reference.weight(site.fqn, tuple(site.base.shape)).to(site.base.device))
        if shown is not None:
            check_finite_inputs(site, shown)
        action = "from reference" if shown is None else "from reference, calibrated"
        state = rounded(site, wanted, None if shown is None else shown.seen)
        return write_rounded(site, state, action, shown, bound)
