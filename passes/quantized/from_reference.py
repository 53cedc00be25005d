"""Make a quantized weight anew from the original float one, rotated."""

from __future__ import annotations

from torch import Tensor

from oftfx.folding.record import SiteFold
from oftfx.folding.reference import ReferenceWeights
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.passes.quantized.policy import QuantizedPolicy, rounded, write_rounded


class FromReference(QuantizedPolicy):
    """``quantized="reference"``: for adapters that were trained on the float model.

    Args:
        reference: the original weights.
    """

    name = "from_reference"
    preserves = "lossy"

    def __init__(self, reference: ReferenceWeights) -> None:
        self.reference = reference

    def fold(self, site: Turned, bench: Workbench, moments: Tensor | None, bound: float) -> SiteFold | None:  # noqa: ARG002
        """Rotate the original and round it, compensated where moments are known."""
        wanted = site.turned(self.reference.weight(site.fqn, tuple(site.base.shape)).to(site.base.device))
        action = "from reference" if moments is None else "from reference, calibrated"
        return write_rounded(site, rounded(site, wanted, moments), action, moments, bound)
