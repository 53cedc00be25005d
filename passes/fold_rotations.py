"""Put rotations into the weights: ``W' = W @ blockdiag(R)^T``, and measure what arrived."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn as nn

from oftfx.errors import FoldError, OftfxWarning, PassError
from oftfx.fold_record import SiteFold, Undo
from oftfx.formats import WeightFormat, format_of
from oftfx.passes.formats.dense import FLOATS
from oftfx.passes.freeze_rotations import Freezer, product_of
from oftfx.passes.protocol import BOUNDS, Change, Pass, PassResult, relative_error
from oftfx.placement import CHILD, Placement, RotateInput, rotated_sites
from oftfx.probe import has_own_forward, probe
from oftfx.program import Program
from oftfx.rotation.module import Rotation
from oftfx.sites import Site
from oftfx.structure import HOOKS, replace_module
from oftfx.untie import Untied, untie

POLICIES = ("keep", "requantize", "float")
LATER_POLICIES = ("calibrate", "reference")
Policy = str | Callable[[Site], str]

_NEVER_RAN = (
    "this layer has never been called while others have, so its rotation may not be part of what the model computed "
    "(its weight may be used by other code); compare folded and unfolded outputs, or exclude it by a rule"
)
_NOT_PROBED = "its class has a forward of its own that could not be tried alone; compare folded and unfolded outputs"


class FoldRotations(Pass):
    """Fold every site of the model in place.

    A float weight takes its rotation exactly, computed in float32 (float64 for float64) blockwise and rounded once.
    A quantized one follows the policy: ``"keep"`` and ``"float"`` are exact, ``"requantize"`` rounds to the format's
    grid. A weight whose rotation is exactly the identity is never touched.

    Args:
        quantized: a policy, or a function from `Site` to one.
        progress: called with (sites done, all sites) after each.

    Attributes:
        sites: one `SiteFold` a site, after ``run``.
        undo: what it takes to bring each site back, after ``run``.
    """

    name = "fold_rotations"
    preserves = "lossy"  # per site; exact and rounding ones are in the report
    after = ("insert_rotations",)

    def __init__(self, quantized: Policy = "keep", progress: Callable[[int, int], None] | None = None) -> None:
        if isinstance(quantized, str):
            _check_policy(quantized, "quantized")
        self.quantized, self.progress = quantized, progress
        self.sites: list[SiteFold] = []
        self.undo: list[Undo | Untied] = []

    def run(self, program: Program) -> PassResult:
        """Fold, site by site.

        Raises:
            FoldError: an unknown policy, a weight that is not finite, or a layer that does not compute ``x @ W^T``.
        """
        sites = {s.fqn: s for s in program.sites}
        todo = list(rotated_sites(program.model))
        policies = {fqn: self._policy(sites, fqn) for fqn, _ in todo}  # a bad one is found before anything changes
        counts = Counter(id(p) for _, p in program.model.named_parameters(remove_duplicate=False))
        aliases = {id(p) for m in _several_names(program.model) for p in m._parameters.values() if p is not None}
        shared = {i for i, n in counts.items() if n > 1 and i not in aliases}
        folder = _Folder(program.model, shared, self.undo)
        changes = []
        some_ran = any(placement.ran for _, placement in todo)
        for index, (fqn, placement) in enumerate(todo):
            remark = _NEVER_RAN if some_ran and not placement.ran else _later_hooks(placement)
            weight_format = placement.weight_format()
            if weight_format is None:
                raise FoldError(_unreadable(fqn, placement))
            path = folder.paths[placement.module]
            self.undo.append(Undo.of(path, placement, weight_format))
            done = folder.fold(fqn, placement, weight_format, policies[fqn])
            if remark:
                done = replace(done, note=_joined(done.note, remark))
                warnings.warn(f"{fqn}: {remark}", OftfxWarning, stacklevel=2)
            self.sites.append(done)
            changes.append(Change(fqn, done.action, done.note))
            if self.progress is not None:
                self.progress(index + 1, len(todo))
        return PassResult(program.with_(sites=Program.of(program.model).sites), bool(todo), tuple(changes))

    def check(self, result: Program) -> None:
        """No trainable rotation is left."""
        if left := [n for n, m in result.model.named_modules() if isinstance(m, Rotation)]:
            raise PassError(f"{left[0]} was not folded")

    def _policy(self, sites: Mapping[str, Site], fqn: str) -> str:
        if isinstance(self.quantized, str) or fqn not in sites:  # what only a recording shows is a float parameter
            return self.quantized if isinstance(self.quantized, str) else "keep"
        policy = self.quantized(sites[fqn])
        _check_policy(policy, f"quantized(Site {fqn})")
        return policy


def _several_names(model: nn.Module) -> list[nn.Module]:
    counts = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    return [m for m, n in counts.items() if n > 1]


def _later_hooks(placement: Placement) -> str:
    """A remark where a pre-hook that was registered later sees the rotated input now and the plain one after a fold."""
    if not isinstance(placement, RotateInput):
        return ""
    hooks = list(placement.module._forward_pre_hooks.values())
    later = hooks[hooks.index(placement) + 1 :]
    later = [h for h in later if not isinstance(h, Placement)]
    remark = f"{len(later)} pre-hook(s) registered after the rotation see the layer's unrotated input now"
    return remark if later else ""


def _check_policy(policy: object, where: str) -> None:
    if policy in LATER_POLICIES:
        raise FoldError(f"{where}: policy {policy!r} is not available in this version; there are {', '.join(POLICIES)}")
    if policy not in POLICIES:
        raise FoldError(f"{where}: got {policy!r}, expected one of {', '.join(POLICIES)}")


class _Folder:
    """Folds the sites of one model."""

    def __init__(self, model: nn.Module, shared: set[int], undo: list[Undo | Untied]) -> None:
        self.model, self.shared, self.undo = model, shared, undo
        self.freezer = Freezer()
        self.paths = {m: n for n, m in model.named_modules()}

    @torch.no_grad()
    def fold(self, fqn: str, placement: Placement, weight_format: WeightFormat, policy: str) -> SiteFold:
        """Fold one site by a policy."""
        module, chain, name = placement.module, product_of(placement.in_effect()), weight_format.name
        before = weight_format.nbytes(module)
        base = weight_format.dequantize(module)
        if all(_is_identity(b) for b in chain):
            placement.drop()
            return SiteFold(fqn, name, "untouched", 0.0, 0.0, 1.0, before, before)
        layout = weight_format.layout(module)
        target = layout.turned_by(base, [b.to(base.device) for b in chain])
        update = _share(_size(target - base), _size(base))
        if not math.isfinite(update):
            raise FoldError(f"{fqn}: the rotated weight is not finite; look at the adapter's values there")
        is_shared = id(module._parameters.get(placement.parameter)) in self.shared
        note = "its weight was shared with another module and is now its own" if is_shared else ""
        if policy == "keep" and not weight_format.lossless:
            self.freezer.freeze(placement)
            after = before + sum(b.numel() * b.element_size() for b in chain)
            return SiteFold(fqn, name, "kept", update, 0.0, 1.0, before, after, note)
        if weight_format.lossless:
            action = "folded"
            note = _joined(note, self._fold_float(fqn, placement, weight_format, target))
        elif policy == "float":
            action = "dequantized"
            placement.drop()
            module = _replace(self.model, module, weight_format, target)
            weight_format = _format(module)
        else:
            action = "requantized"
            weight_format.write(module, weight_format.requantize(target, module))
            placement.drop()
        error, survival = 0.0, 1.0
        if not weight_format.lossless or weight_format.dtype(module) != target.dtype:  # else nothing was rounded
            error, survival = _arrived(base, target, weight_format.dequantize(module))
        if not math.isfinite(error):
            raise FoldError(f"{fqn}: the rotated weight overflows {weight_format.dtype(module)}; fold in a wider dtype")
        return SiteFold(fqn, name, action, update, error, survival, before, weight_format.nbytes(module), note)

    def _fold_float(self, fqn: str, placement: Placement, weight_format: WeightFormat, target: torch.Tensor) -> str:
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


def _unreadable(fqn: str, placement: Placement) -> str:
    kind = type(placement.module).__name__
    if hasattr(placement.module._parameters.get(placement.parameter), "full_tensor"):
        return (
            f"{fqn}: the weight of this {kind} is sharded by FSDP. Gather it first: load "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) into a model of one process "
            "that was transformed by the same rules, and fold that"
        )
    return f"{fqn}: no known weight format reads this {kind} any more"


def _joined(*notes: str) -> str:
    return "; ".join(n for n in notes if n)


def _size(weight: torch.Tensor) -> float:
    """Frobenius norm; torch sums in a tree, so float32 is good to six digits."""
    return float(torch.linalg.vector_norm(weight))


def _arrived(base: torch.Tensor, target: torch.Tensor, folded: torch.Tensor) -> tuple[float, float]:
    """Relative error of the folded weight, and survival of the update."""
    folded, wanted = folded.to(base.device), target - base
    norm = _size(wanted) ** 2
    survival = float(torch.sum((folded - base) * wanted)) / norm if norm > 0 else 1.0
    return _share(_size(folded - target), _size(target)), survival


def _share(part: float, whole: float) -> float:
    return part / whole if whole else part  # a weight of zeros stays zeros under any rotation


def _is_identity(blocks: torch.Tensor) -> bool:
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return bool((blocks == eye).all())


def _format(module: nn.Module) -> WeightFormat:
    found = format_of(module)
    assert found is not None
    return found


def _replace(model: nn.Module, module: nn.Module, weight_format: WeightFormat, target: torch.Tensor) -> nn.Module:
    """Put a float layer with the rotated weight in the place of a quantized one; hooks go along."""
    new = weight_format.float_module(module, target.to(_activation_dtype(model, module, weight_format)))
    for name in HOOKS:
        getattr(new, name).update(getattr(module, name))
    replace_module(model, module, new)
    return new


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
