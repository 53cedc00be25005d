"""Round the rotated weight to the nearest codes of its format."""

from __future__ import annotations

from oftfx.folding.policies import Budget
from oftfx.folding.record import SiteFold
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.passes.quantized.policy import QuantizedPolicy, rounded, write_rounded


class Requantize(QuantizedPolicy):
    """``quantized="requantize"``: the nearest codes of ``W' = dequantize(W_q) @ blockdiag(R)^T``.

    Fast, no data; what is small against a rounding step is lost, and measured.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> from oftfx.passes import Requantize, Program
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> found = Requantize().run(Program.of(model)).found
        >>> [(site.fqn, site.action, site.relative_error < 0.01) for site in found.sites]
        [('0', 'requantized', True)]
    """

    name = "requantize"
    preserves = "lossy"

    def fold(self, site: Turned, bench: Workbench, shown: Shown | None, bound: Budget | None) -> SiteFold | None:  # noqa: ARG002
        """Round."""
        return write_rounded(site, rounded(site, site.target, None), "requantized", shown, bound)
