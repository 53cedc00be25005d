"""Fold one site by one policy, and measure what arrived."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.fold_record import SiteFold, Undo
from oftfx.formats import WeightFormat, WeightState, format_of
from oftfx.moments import output_arrived
from oftfx.passes.formats.dense import FLOATS
from oftfx.passes.freeze_rotations import Freezer, product_of
from oftfx.passes.protocol import BOUNDS, relative_error
from oftfx.placement import CHILD, Placement
from oftfx.policies import Budget, choices
from oftfx.probe import has_own_forward, probe
from oftfx.reference import ReferenceWeights
from oftfx.structure import HOOKS, replace_module
from oftfx.untie import Untied, untie

_NOT_PROBED = "its class has a forward of its own that could not be tried alone; compare folded and unfolded outputs"
_ACTIONS = {"requantize": "requantized", "calibrate": "calibrated", "reference": "from reference"}


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
        if weight_format.lossless:
            note = _joined(note, self._fold_float(fqn, placement, weight_format, target))
            error, survival = 0.0, 1.0
            if weight_format.dtype(module) != target.dtype:  # else nothing was rounded
                error, survival = _arrived(base, target, weight_format.dequantize(module))
            _check_finite(fqn, error, weight_format.dtype(module))
            return SiteFold(fqn, name, "folded", update, error, survival, before, weight_format.nbytes(module), note)

        options = choices(policy)
        for index, option in enumerate(options):
            if option == "keep":
                self.freezer.freeze(placement)
                after = before + sum(b.numel() * b.element_size() for b in chain)
                return SiteFold(fqn, name, "kept", update, 0.0, 1.0, before, after, note)
            if option == "float":
                new = weight_format.float_module(
                    module, target.to(_activation_dtype(self.model, module, weight_format))
                )
                self._later.append((placement, new))
                now = _format(new)
                error, survival = _arrived(base, target, now.dequantize(new))
                _check_finite(fqn, error, now.dtype(new))
                after = now.nbytes(new)
                return SiteFold(fqn, name, "dequantized", update, error, survival, before, after, note)
            if option == "calibrate" and moments is None and index + 1 < len(options):
                continue
            old = weight_format.read(module)
            wanted = self._reference(fqn, base, chain, layout.turned_by) if option == "reference" else target
            weight_format.write(module, self._rounded(fqn, wanted, weight_format, module, option, moments))
            folded = weight_format.dequantize(module).to(base.device)
            error, survival = _arrived(base, target, folded)
            outputs = (None, None) if moments is None else output_arrived(base, target, folded, moments)
            measured = error if outputs[0] is None else outputs[0]
            if isinstance(policy, Budget) and measured > policy.error and index + 1 < len(options):
                weight_format.write(module, old)
                continue
            placement.drop()
            _check_finite(fqn, error, weight_format.dtype(module))
            after = weight_format.nbytes(module)
            action = _ACTIONS["requantize" if option == "calibrate" and moments is None else option]
            if option == "reference" and moments is not None:
                action += ", calibrated"
            return SiteFold(fqn, name, action, update, error, survival, before, after, note, *outputs)
        raise AssertionError("a budget's last policy is always applied")

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

    def _rounded(
        self,
        fqn: str,
        wanted: Tensor,
        weight_format: WeightFormat,
        module: nn.Module,
        option: str,
        moments: Tensor | None,
    ) -> WeightState:
        if option == "requantize" or moments is None:
            return weight_format.requantize(wanted, module)
        if not torch.isfinite(moments).all():
            raise FoldError(f"{fqn}: the layer's inputs are not finite on the calibration data; look for the first NaN")
        return weight_format.calibrate(wanted, module, moments)

    def _reference(self, fqn: str, base: Tensor, chain: Sequence[Tensor], turned_by: object) -> Tensor:
        assert self.reference is not None
        assert callable(turned_by)
        return turned_by(self.reference.weight(fqn, tuple(base.shape)).to(base.device), chain)

    def _fold_float(self, fqn: str, placement: Placement, weight_format: WeightFormat, target: Tensor) -> str:
        """Write the rotated weight; returns a remark."""
        module = placement.module
        tried = placement.format is None and has_own_forward(module)
        probed = probe(module) if tried else None
        weight_format.write(module, weight_format.requantize(target, module))
        placement.drop()
        if probed is not None:
            _check_probe(fqn, module, *probed)
        path = self.paths[module]
        untied = untie(self.model, f"{path}.{placement.parameter}" if path else placement.parameter)
        if untied is not None:
            self.undo.append(untied)
        return _NOT_PROBED if tried and probed is None else ""


def _joined(*notes: str) -> str:
    return "; ".join(n for n in notes if n)


def _size(weight: Tensor) -> float:
    """Frobenius norm; torch sums in a tree, so float32 is good to six digits."""
    return float(torch.linalg.vector_norm(weight))


def _arrived(base: Tensor, target: Tensor, folded: Tensor) -> tuple[float, float]:
    """Relative error of the folded weight, and survival of the update."""
    folded, wanted = folded.to(base.device), target - base
    norm = _size(wanted) ** 2
    survival = float(torch.sum((folded - base) * wanted)) / norm if norm > 0 else 1.0
    return _share(_size(folded - target), _size(target)), survival


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
