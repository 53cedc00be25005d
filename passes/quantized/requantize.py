"""Round the rotated weight to the nearest codes of its format."""

from __future__ import annotations

from torch import Tensor

from oftfx.folding.record import SiteFold
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.passes.quantized.policy import QuantizedPolicy, rounded, write_rounded


class Requantize(QuantizedPolicy):
    """``quantized="requantize"``: fast, no data; what is small against a rounding step is lost, and measured."""

    name = "requantize"
    preserves = "lossy"

    def fold(self, site: Turned, bench: Workbench, moments: Tensor | None, bound: float) -> SiteFold | None:  # noqa: ARG002
        """Round."""
        return write_rounded(site, rounded(site, site.target, None), "requantized", moments, bound)
