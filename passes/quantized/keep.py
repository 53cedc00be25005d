"""Leave a quantized weight bit for bit, and its rotation in front of it."""

from __future__ import annotations

from torch import Tensor

from oftfx.folding.record import SiteFold
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.passes.quantized.policy import QuantizedPolicy


class Keep(QuantizedPolicy):
    """``quantized="keep"``: exact. The blocks become fixed numbers; no Cayley transform is left."""

    name = "keep"
    preserves = "rounding"

    def fold(self, site: Turned, bench: Workbench, moments: Tensor | None, bound: float) -> SiteFold:  # noqa: ARG002
        """Freeze the rotation."""
        bench.freezer.freeze(site.placement)
        after = site.before + sum(b.numel() * b.element_size() for b in site.chain)
        return site.line("kept", after)
