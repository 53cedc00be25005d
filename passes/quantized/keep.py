"""Leave a quantized weight bit for bit, and its rotation in front of it."""

from __future__ import annotations

from oftfx.folding.policies import Budget
from oftfx.folding.record import SiteFold
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.passes.quantized.policy import QuantizedPolicy


class Keep(QuantizedPolicy):
    """``quantized="keep"``: exact, ``y = (x @ blockdiag(R)) @ W_q^T``.

    The blocks become fixed numbers; no Cayley transform is left.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> from oftfx.passes import Keep, Program
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> [(change.site, change.action) for change in Keep().run(Program.of(model)).changes]
        [('0', 'kept')]
        >>> torch.equal(model[0].weight, base[0].weight)
        True
    """

    name = "keep"
    preserves = "rounding"

    def fold(self, site: Turned, bench: Workbench, shown: Shown | None, bound: Budget | None) -> SiteFold:  # noqa: ARG002
        """Freeze the rotation."""
        bench.freezer.freeze(site.placement)
        after = site.before + sum(b.numel() * b.element_size() for b in site.chain)
        return site.line("kept", after)
