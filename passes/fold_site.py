"""Fold one site by one policy, and measure what arrived."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.folding.moments import output_arrived
from oftfx.folding.policies import Budget, choices
from oftfx.folding.probe import has_own_forward, probe
from oftfx.folding.record import SiteFold, Undo
from oftfx.folding.reference import ReferenceWeights
from oftfx.formats.base import WeightFormat, WeightState
from oftfx.formats.dense import FLOATS
from oftfx.formats.layout import Layout
from oftfx.formats.registry import format_of
from oftfx.model.huggingface import Untied, untie
from oftfx.model.names import CHILD
from oftfx.model.structure import HOOKS, replace_module
from oftfx.placement.base import Placement
from oftfx.placement.frozen import Freezer, product_of
from oftfx.precision import BOUNDS, relative_error

_NOT_PROBED = "its class has a forward of its own that could not be tried alone; compare folded and unfolded outputs"
_ACTIONS = {"requantize": "requantized", "calibrate": "calibrated", "reference": "from reference"}


@dataclass(frozen=True, eq=False)
class _Site:
    """What is known of a site before it is folded.

    Attributes:
        fqn: its path.
        placement: its rotations.
        format: of its weight.
        layout: which axis of the weight they turn.
        base: the weight as it is, ``(out, in)``.
        chain: blocks, in the order in which they act.
        target: the weight turned by them.
        update: relative size of ``target - base``.
        before: bytes of the weight.
        note: for the report.
    """

    fqn: str
    placement: Placement
    format: WeightFormat
    layout: Layout
    base: Tensor
    chain: list[Tensor]
    target: Tensor
    update: float
    before: int
    note: str

    @property
    def module(self) -> nn.Module:
        """The layer."""
        return self.placement.module

    def arrived(self, folded: Tensor) -> tuple[float, float]:
        """Relative error of the folded weight, and survival of the update."""
        folded, wanted = folded.to(self.base.device), self.target - self.base
        norm = _size(wanted) ** 2
        survival = float(torch.sum((folded - self.base) * wanted)) / norm if norm > 0 else 1.0
        return _share(_size(folded - self.target), _size(self.target)), survival

    def fold(
        self,
        action: str,
        error: float,
        survival: float,
        after: int,
        *,
        note: str | None = None,
        outputs: tuple[float | None, float | None] = (None, None),
    ) -> SiteFold:
        """The site's line of the report."""
        note = self.note if note is None else note
        return SiteFold(
            self.fqn, self.format.name, action, self.update, error, survival, self.before, after, note, *outputs
        )


class SiteFolder:
    """Folds the sites of one model, one after another.

    Args:
        model: is changed.
        shared: ids of weights that another module has as well.
        undo: what is needed to bring other modules back is added here.
        reference: original float weights, for that policy.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: set[int],
        undo: list[Undo | Untied],
        reference: ReferenceWeights | None = None,
    ) -> None:
        self.model, self.shared, self.undo, self.reference = model, shared, undo, reference
        self.freezer = Freezer()
        self._later: list[tuple[Placement, nn.Module]] = []
        self.paths = {m: n for n, m in model.named_modules()}

    @torch.no_grad()
    def fold(
        self,
        fqn: str,
        placement: Placement,
        weight_format: WeightFormat,
        policy: str | Budget,
        moments: Tensor | None = None,
    ) -> SiteFold:
        """Fold one site.

        Args:
            fqn: its path.
            placement: its rotations.
            weight_format: how it stores its weight.
            policy: for a quantized weight.
            moments: second moments of what the layer reads, for error-compensated rounding.

        Raises:
            FoldError: a weight that is not finite, or a layer that does not compute ``x @ W^T``.
        """
        module, chain, name = placement.module, product_of(placement.in_effect()), weight_format.name
        before = weight_format.nbytes(module)
        base = weight_format.dequantize(module)
        if all(_is_identity(b) for b in chain):
            placement.drop()
            return SiteFold(fqn, name, "untouched", 0.0, 0.0, 1.0, before, before)
        layout = weight_format.layout(module)
        chain = [b.to(base.device) for b in chain]
        target = layout.turned_by(base, chain)
        update = _share(_size(target - base), _size(base))
        if not math.isfinite(update):
            raise FoldError(f"{fqn}: the rotated weight is not finite; look at the adapter's values there")
        is_shared = id(module._parameters.get(placement.parameter)) in self.shared
        note = "its weight was shared with another module and is now its own" if is_shared else ""
        site = _Site(fqn, placement, weight_format, layout, base, chain, target, update, before, note)
        if weight_format.lossless:
            return self._into_float(site)
        options = choices(policy)
        for option, has_next in zip(options, (*(True for _ in options[1:]), False), strict=True):
            if option == "keep":
                return self._keep(site)
            if option == "float":
                return self._to_float(site)
            if option == "calibrate" and moments is None and has_next:
                continue
            bound = policy.error if isinstance(policy, Budget) and has_next else math.inf
            if (done := self._round(site, option, moments, bound)) is not None:
                return done
        raise AssertionError("a budget's last policy is always applied")

    def _keep(self, site: _Site) -> SiteFold:
        """Leave the bytes, and the rotation in front of them."""
        self.freezer.freeze(site.placement)
        after = site.before + sum(b.numel() * b.element_size() for b in site.chain)
        return site.fold("kept", 0.0, 1.0, after)

    def _to_float(self, site: _Site) -> SiteFold:
        """A float layer, put in place by `finish`."""
        dtype = _activation_dtype(self.model, site.module, site.format)
        new = site.format.float_module(site.module, site.target.to(dtype))
        self._later.append((site.placement, new))
        now = _format(new)
        error, survival = site.arrived(now.dequantize(new))
        _check_finite(site.fqn, error, now.dtype(new))
        return site.fold("dequantized", error, survival, now.nbytes(new))

    def _round(self, site: _Site, option: str, moments: Tensor | None, bound: float) -> SiteFold | None:
        """Round to the format's grid; None, and nothing changed, where the error is over the bound."""
        module, weight_format = site.module, site.format
        old = weight_format.read(module)
        wanted = self._reference(site) if option == "reference" else site.target
        weight_format.write(module, _rounded(site, wanted, option, moments))
        folded = weight_format.dequantize(module).to(site.base.device)
        error, survival = site.arrived(folded)
        outputs = (None, None) if moments is None else output_arrived(site.base, site.target, folded, moments)
        if (error if outputs[0] is None else outputs[0]) > bound:
            weight_format.write(module, old)
            return None
        site.placement.drop()
        _check_finite(site.fqn, error, weight_format.dtype(module))
        action = _ACTIONS["requantize" if option == "calibrate" and moments is None else option]
        if option == "reference" and moments is not None:
            action += ", calibrated"
        return site.fold(action, error, survival, weight_format.nbytes(module), outputs=outputs)

    def _reference(self, site: _Site) -> Tensor:
        """The original float weight, rotated."""
        assert self.reference is not None
        original = self.reference.weight(site.fqn, tuple(site.base.shape))
        return site.layout.turned_by(original.to(site.base.device), site.chain)

    def _into_float(self, site: _Site) -> SiteFold:
        """Write the rotated weight where a float one was."""
        module, placement, weight_format = site.module, site.placement, site.format
        tried = placement.format is None and has_own_forward(module)
        probed = probe(module) if tried else None
        weight_format.write(module, weight_format.requantize(site.target, module))
        placement.drop()
        if probed is not None:
            _check_probe(site.fqn, module, *probed)
        path = self.paths[module]
        untied = untie(self.model, f"{path}.{placement.parameter}" if path else placement.parameter)
        if untied is not None:
            self.undo.append(untied)
        note = _joined(site.note, _NOT_PROBED if tried and probed is None else "")
        error, survival = 0.0, 1.0
        if weight_format.dtype(module) != site.target.dtype:  # else nothing was rounded
            error, survival = site.arrived(weight_format.dequantize(module))
        _check_finite(site.fqn, error, weight_format.dtype(module))
        return site.fold("folded", error, survival, weight_format.nbytes(module), note=note)

    def finish(self) -> None:
        """Put the float layers into their places.

        A forward that is under way while its layer is folded goes on in the old one; until now it has its rotation.
        """
        for placement, new in self._later:
            placement.drop()
            for name in HOOKS:
                getattr(new, name).update(getattr(placement.module, name))
            replace_module(self.model, placement.module, new)
        self._later.clear()


def _rounded(site: _Site, wanted: Tensor, option: str, moments: Tensor | None) -> WeightState:
    if option == "requantize" or moments is None:
        return site.format.requantize(wanted, site.module)
    if not torch.isfinite(moments).all():
        raise FoldError(
            f"{site.fqn}: the layer's inputs are not finite on the calibration data; look for the first NaN"
        )
    return site.format.calibrate(wanted, site.module, moments)


def _joined(*notes: str) -> str:
    return "; ".join(n for n in notes if n)


def _size(weight: Tensor) -> float:
    """Frobenius norm; torch sums in a tree, so float32 is good to six digits."""
    return float(torch.linalg.vector_norm(weight))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else part  # a weight of zeros stays zeros under any rotation


def _check_finite(fqn: str, error: float, dtype: torch.dtype) -> None:
    if not math.isfinite(error):
        raise FoldError(f"{fqn}: the rotated weight overflows {dtype}; fold in a wider dtype")


def _is_identity(blocks: torch.Tensor) -> bool:
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return bool((blocks == eye).all())


def _format(module: nn.Module) -> WeightFormat:
    found = format_of(module)
    assert found is not None
    return found


def _activation_dtype(model: nn.Module, module: nn.Module, weight_format: WeightFormat) -> torch.dtype:
    """Dtype of the float parameters around a quantized layer: what its inputs have.

    The layer itself casts, so the dtype its weight once had (bfloat16, say) need not be that of its inputs. Codes may
    be float8, and scales of any dtype: neither counts.
    """
    counts = Counter(
        p.dtype
        for n, p in model.named_parameters()
        if type(p) is nn.Parameter and p.dtype in FLOATS and n.endswith(("weight", "bias")) and f".{CHILD}." not in n
    )
    return counts.most_common(1)[0][0] if counts else weight_format.dtype(module)


def _check_probe(fqn: str, module: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> None:
    error = relative_error(module(x), expected)
    if not error <= BOUNDS[expected.dtype]:
        raise FoldError(
            f"{fqn}: a {type(module).__name__} has a forward of its own that does not compute x @ W^T: folded and "
            f"unfolded differ by a relative {error:.2g}. Exclude it by a rule, or leave the model unfolded"
        )
