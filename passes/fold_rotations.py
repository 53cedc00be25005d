"""Put rotations into the weights: ``W' = W @ blockdiag(R)^T``, and measure what arrived."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from oftfx.errors import FoldError, OftfxWarning, PassError
from oftfx.formats import WeightFormat, WeightState, format_of
from oftfx.hooks import CHILD, RotateInput, attach, detach, rotated_sites
from oftfx.passes.freeze_rotations import Freezer, product_of
from oftfx.passes.protocol import BOUNDS, Change, Pass, PassResult, relative_error
from oftfx.program import Program, Site
from oftfx.rotation.module import FrozenRotation, Rotation
from oftfx.rotation.rotate import rotate_weight
from oftfx.structure import HOOKS, replace_module

POLICIES = ("keep", "requantize", "float")
LATER_POLICIES = ("calibrate", "reference")
Policy = str | Callable[[Site], str]


@dataclass(frozen=True)
class SiteFold:
    """What a fold did to one site.

    Attributes:
        fqn: module path.
        format: weight format before the fold.
        action: ``"folded"`` (float weight rotated), ``"kept"`` (quantized weight untouched, rotation in front),
            ``"requantized"``, ``"dequantized"`` (now a float layer) or ``"untouched"`` (the rotation was the identity).
        update: ``|W_target - W| / |W|``, how far the rotation moved the weight.
        relative_error: ``|W_folded - W_target| / |W_target|``, Frobenius; 0 where nothing was rounded.
        survival: ``<W_folded - W, W_target - W> / |W_target - W|^2``, the share of the update that arrived.
        bytes_before: size of the stored weight.
        bytes_after: the same afterwards, with a rotation that stays in front.
        note: what a user should know.
    """

    fqn: str
    format: str
    action: str
    update: float
    relative_error: float
    survival: float
    bytes_before: int
    bytes_after: int
    note: str = ""


@dataclass(frozen=True)
class Undo:
    """What a site was before the fold: the layer object, its weight, its rotations."""

    fqn: str
    module: nn.Module
    format: WeightFormat
    state: WeightState
    fixed: tuple[FrozenRotation, ...]
    rotations: Mapping[str, Rotation]
    active: tuple[str, ...]
    holder: nn.Module | None


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
        undo: what `restore` needs, after ``run``.
    """

    name = "fold_rotations"
    preserves = "lossy"  # per site; exact and rounding ones are in the report
    after = ("insert_rotations",)

    def __init__(self, quantized: Policy = "keep", progress: Callable[[int, int], None] | None = None) -> None:
        if isinstance(quantized, str):
            _check_policy(quantized, "quantized")
        self.quantized, self.progress = quantized, progress
        self.sites: list[SiteFold] = []
        self.undo: list[Undo] = []

    def run(self, program: Program) -> PassResult:
        """Fold, site by site.

        Raises:
            FoldError: an unknown policy, a weight that is not finite, or a layer that does not compute ``x @ W^T``.
        """
        sites = {s.fqn: s for s in program.sites}
        todo = list(rotated_sites(program.model))
        policies = {fqn: self._policy(sites, fqn) for fqn, _, _ in todo}  # a bad one is found before anything changes
        shared = {id(p) for s in program.sites if s.tied for p in _weights(program.model, s)}
        freezer = Freezer()
        changes = []
        some_ran = any(hook.ran for _, _, hook in todo)
        for index, (fqn, module, hook) in enumerate(todo):
            remark = _NEVER_RAN if some_ran and not hook.ran else _later_hooks(module, hook)
            weight_format = format_of(module)
            if weight_format is None:
                raise FoldError(f"{fqn}: no known weight format reads this {type(module).__name__} any more")
            self.undo.append(_remember(fqn, module, weight_format, hook))
            done = _fold_site(program.model, fqn, module, hook, weight_format, policies[fqn], freezer, shared)
            if remark:
                done = replace(done, note="; ".join(n for n in (done.note, remark) if n))
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
        if isinstance(self.quantized, str):
            return self.quantized
        policy = self.quantized(sites[fqn])
        _check_policy(policy, f"quantized(Site {fqn})")
        return policy


_NEVER_RAN = (
    "this layer has never been called while others have, so its rotation may not be part of what the model computed "
    "(its weight may be used by other code); compare folded and unfolded outputs, or exclude it by a rule"
)


def _later_hooks(module: nn.Module, hook: RotateInput) -> str:
    """A remark where a pre-hook that was registered later sees the rotated input now and the plain one after a fold."""
    hooks = list(module._forward_pre_hooks.values())
    later = hooks[hooks.index(hook) + 1 :]
    remark = f"{len(later)} pre-hook(s) registered after the rotation see the layer's unrotated input now"
    return remark if later else ""


def _check_policy(policy: object, where: str) -> None:
    if policy in LATER_POLICIES:
        raise FoldError(f"{where}: policy {policy!r} is not available in this version; there are {', '.join(POLICIES)}")
    if policy not in POLICIES:
        raise FoldError(f"{where}: got {policy!r}, expected one of {', '.join(POLICIES)}")


def _weights(model: nn.Module, site: Site) -> Iterator[nn.Parameter]:
    weight = model.get_submodule(site.fqn)._parameters.get("weight")
    if weight is not None:
        yield weight


def _remember(fqn: str, module: nn.Module, weight_format: WeightFormat, hook: RotateInput) -> Undo:
    holder = module._modules.get(CHILD)
    if holder is not None:  # a shell of its own: folding empties the original
        shell = type(holder)()
        shell._modules.update(holder._modules)
        shell.training, holder = holder.training, shell
    state = weight_format.read(module)
    return Undo(fqn, module, weight_format, state, tuple(hook.fixed), dict(hook.rotations), tuple(hook.active), holder)


@torch.no_grad()
def _fold_site(
    model: nn.Module,
    fqn: str,
    module: nn.Module,
    hook: RotateInput,
    weight_format: WeightFormat,
    policy: str,
    freezer: Freezer,
    shared: set[int],
) -> SiteFold:
    chain, name = product_of(hook.in_effect()), weight_format.name
    before = weight_format.nbytes(module)
    base = weight_format.dequantize(module)
    if all(_is_identity(b) for b in chain):
        detach(module)
        return SiteFold(fqn, name, "untouched", 0.0, 0.0, 1.0, before, before)
    target = base
    for blocks in reversed(chain):  # x R1 R2 W^T = x (W R2^T R1^T)^T
        target = rotate_weight(target, blocks.to(target.device))
    update = _share(_size(target - base), _size(base))
    if not math.isfinite(update):
        raise FoldError(f"{fqn}: the rotated weight is not finite; look at the adapter's values there")
    note = "its weight was shared with another module and is now its own" if id(_weight(module)) in shared else ""
    error, survival, after = 0.0, 1.0, before
    if policy == "keep" and not weight_format.lossless:
        freezer.freeze(module, hook)
        after += sum(b.numel() * b.element_size() for b in chain)
        return SiteFold(fqn, name, "kept", update, error, survival, before, after, note)
    if weight_format.lossless:
        action = "folded"
        probe = _probe(module, base.shape[1]) if _own_forward(module) else None
        weight_format.write(module, weight_format.requantize(target, module))
        detach(module)
        if probe is not None:
            _check_probe(fqn, module, probe)
        _untie(model, fqn)
    elif policy == "float":
        action = "dequantized"
        detach(module)
        module = _replace(model, module, weight_format, target)
        weight_format = _format(module)
    else:
        action = "requantized"
        weight_format.write(module, weight_format.requantize(target, module))
        detach(module)
    if not weight_format.lossless or weight_format.dtype(module) != target.dtype:  # else nothing was rounded
        error, survival = _arrived(base, target, weight_format.dequantize(module))
    if not math.isfinite(error):
        raise FoldError(f"{fqn}: the rotated weight overflows {weight_format.dtype(module)}; fold in a wider dtype")
    after = weight_format.nbytes(module)
    return SiteFold(fqn, name, action, update, error, survival, before, after, note)


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


def _weight(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("weight")


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

    The layer itself casts, so the dtype its weight once had (bfloat16, say) need not be that of its inputs.
    """
    counts = Counter(
        p.dtype
        for n, p in model.named_parameters()
        if type(p) is nn.Parameter and p.is_floating_point() and f".{CHILD}." not in n
    )
    return counts.most_common(1)[0][0] if counts else weight_format.dtype(module)


def _own_forward(module: nn.Module) -> bool:
    """Whether a subclass computes something of its own, so that ``x @ W^T`` has to be verified."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


def _probe(module: nn.Module, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, in_features, generator=generator).to(weight.device, weight.dtype)  # type: ignore[arg-type]
    return x, module(x)


def _check_probe(fqn: str, module: nn.Module, probe: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, expected = probe
    error = relative_error(module(x), expected)
    if not error <= BOUNDS[expected.dtype]:
        raise FoldError(
            f"{fqn}: a {type(module).__name__} has a forward of its own that does not compute x @ W^T: folded and "
            f"unfolded differ by a relative {error:.2g}. Exclude it by a rule, or leave the model unfolded"
        )


def _untie(model: nn.Module, fqn: str) -> None:
    """Tell transformers that a weight is no longer tied, or loading a saved model would tie it again."""
    config = getattr(model, "config", None)
    tied = getattr(model, "all_tied_weights_keys", None)
    name = f"{fqn}.weight"
    if not isinstance(tied, dict) or not any(name in pair for pair in tied.items()):
        return
    model.all_tied_weights_keys = {k: v for k, v in tied.items() if name not in (k, v)}  # type: ignore[assignment]
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]


def restore(model: nn.Module, undo: list[Undo]) -> None:
    """Bring every folded site of ``model`` back: the same bytes, the same rotations."""
    for step in undo:
        module = model.get_submodule(step.fqn)
        if module is not step.module:
            replace_module(model, module, step.module)
            module = step.module
        detach(module)
        step.format.write(module, step.state)
        if step.holder is not None:
            module._modules[CHILD] = step.holder
        hook = attach(module, step.fqn)
        hook.fixed, hook.rotations, hook.active = list(step.fixed), dict(step.rotations), step.active
