"""Make a float layer of a quantized one."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn as nn

from oftfx.errors import FoldError
from oftfx.folding.policies import Budget
from oftfx.folding.record import SiteFold
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.formats.bnb4_experts import Bnb4Experts
from oftfx.formats.dense import FLOATS, DenseParameter
from oftfx.formats.mxfp4_experts import Mxfp4Experts
from oftfx.formats.registry import format_of
from oftfx.model.names import CHILD
from oftfx.passes.quantized.policy import QuantizedPolicy


class Dequantize(QuantizedPolicy):
    """``quantized="float"``: exact, larger; ``W' = dequantize(W_q) @ blockdiag(R)^T``.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> from oftfx.passes import Dequantize, Program
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> [(change.site, change.action) for change in Dequantize().run(Program.of(model)).changes]
        [('0', 'dequantized')]
        >>> type(model[0]).__name__, model[0].weight.dtype
        ('Linear', torch.float32)
    """

    name = "dequantize"
    preserves = "rounding"

    def fold(self, site: Turned, bench: Workbench, shown: Shown | None, bound: Budget | None) -> SiteFold:  # noqa: ARG002
        """Make the layer."""
        dtype = activation_dtype(bench.model, site.format.dtype(site.module))
        if isinstance(site.format, (Bnb4Experts, Mxfp4Experts)):
            return self._plain_parameter(site, site.format, dtype)
        new = site.format.float_module(site.module, site.target.to(dtype))
        bench.replace(site.placement, new)
        now = format_of(new)
        if now is None:
            raise FoldError(f"{site.fqn}: no known format reads the {type(new).__name__} that {site.format.name} made")
        got = site.arrived(now, new)
        site.check_finite(got, now.dtype(new))
        return site.line("dequantized", now.nbytes(new), got)

    def _plain_parameter(self, site: Turned, stored: Bnb4Experts | Mxfp4Experts, dtype: torch.dtype) -> SiteFold:
        """A parameter of a module that has others: it becomes a plain one, and the module stays."""
        module, placement = site.module, site.placement
        shape = stored.geometry(module)
        now = DenseParameter(placement.parameter, site.layout, shape.kind, shape.placements)
        state = stored.as_floats(site.target.to(dtype), module)
        placement.drop()
        stored.write(module, state)
        got = site.arrived(now, module)
        site.check_finite(got, now.dtype(module))
        return site.line("dequantized", now.nbytes(module), got)


def activation_dtype(model: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """Dtype of the float parameters around a quantized layer: what its inputs have.

    The layer itself casts, so the dtype its weight once had (bfloat16, say) need not be that of its inputs. Codes may
    be float8, and scales of any dtype: neither counts.
    """
    counts = Counter(
        p.dtype
        for n, p in model.named_parameters()
        if type(p) is nn.Parameter and p.dtype in FLOATS and n.endswith(("weight", "bias")) and f".{CHILD}." not in n
    )
    return counts.most_common(1)[0][0] if counts else otherwise
