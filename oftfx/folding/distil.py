"""Distil an unfolded model into its fold: one model computes both, and only scales train."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.model.running import Inputs, call_once, evaluating, tensors_of
from oftfx.placement.aware import Aware, unfolded
from oftfx.terminal import bar

RATE = 7.5e-4
"""Of Adam for the shifts of `AwareScales`, whose unit is four: 3e-3 in the logarithm of a scale. On SmolLM2 in NF4,
1e-2 went astray after one pass over 8,192 tokens; 3e-3 was still gaining after four."""
_WARM = 5  # steps
_HELD, _FEW = 8, 4  # one of so many batches is held out; none of fewer than this


def distil(
    model: nn.Module, batches: Sequence[Inputs], passes: int, *, progress: bool | Callable[[int, int], None] = False
) -> tuple[float, float, int]:
    """Train the scales of a fold-aware model to give what the same model gives unfolded, on inputs alone.

    The loss is the Kullback-Leibler divergence of the next-token (or class) distributions where the output has
    ``logits``, else the squared error of all float outputs relative to their size. The model is in eval mode; each
    batch is a step of Adam, and the unfolded outputs are computed anew for each. Of four batches or more, one in eight
    (at least one) is held out: of the states after each pass, and the one before, that with the least loss there is
    kept.

    Args:
        model: some sites are `AwareScales`.
        batches: inputs.
        passes: over all batches.
        progress: as of `oftfx.fold`.

    Returns:
        The loss on what is held out (on all where nothing is) before and after, and how many inputs are.

    Raises:
        FoldError: the outputs are not finite, or hold no floats.

    Source: Hinton et al., arXiv 1503.02531; scales alone end to end: Chen et al., EfficientQAT, arXiv 2407.11062.
    """
    shifts = [p for m in model.modules() if isinstance(m, Aware) for p in m.parameters()]
    every = min(_HELD, len(batches))
    held = list(batches[every - 1 :: every]) if len(batches) >= _FEW else list(batches)
    used = [b for i, b in enumerate(batches) if len(batches) < _FEW or (i + 1) % every]
    trains = [p for p in model.parameters() if p.requires_grad]
    steps, done = passes * len(used), 0
    optimizer = torch.optim.Adam(shifts, lr=RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    with evaluating(model), bar("distil") if progress is True else nullcontext(progress or None) as report:
        try:
            for parameter in trains:
                parameter.requires_grad_(False)
            first = least = _held_out(model, held)
            best = [p.detach().clone() for p in shifts]
            for _ in range(passes):
                for index in torch.randperm(len(used), generator=generator).tolist():
                    for group in optimizer.param_groups:
                        group["lr"] = RATE * min((done + 1) / _WARM, (steps - done) / steps)
                    _step(model, used[index], shifts, optimizer)
                    done += 1
                    if report is not None:
                        report(done, steps)
                loss = _held_out(model, held)
                if loss < least:
                    least, best = loss, [p.detach().clone() for p in shifts]
        finally:
            for parameter in trains:
                parameter.requires_grad_(True)
    with torch.no_grad():
        for parameter, value in zip(shifts, best, strict=True):
            parameter.copy_(value)
    return first, least, 0 if len(batches) < _FEW else len(held)


def _step(model: nn.Module, batch: Inputs, shifts: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    with torch.enable_grad():
        for parameter in shifts:
            parameter.requires_grad_(True)
        try:
            loss = loss_on(model, batch)
            grads = torch.autograd.grad(loss, shifts, allow_unused=True)
        finally:
            for parameter in shifts:
                parameter.requires_grad_(False)
    if not math.isfinite(float(loss.detach())):
        raise FoldError(
            "distil: the folded and the unfolded outputs differ by a number that is not finite on a calibration input; "
            "look for the first NaN there, or leave distil=0"
        )
    for parameter, grad in zip(shifts, grads, strict=True):
        parameter.grad = grad
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _held_out(model: nn.Module, batches: Sequence[Inputs]) -> float:
    with torch.no_grad():
        return math.fsum(float(loss_on(model, b)) for b in batches) / len(batches)


def loss_on(model: nn.Module, batch: Inputs) -> Tensor:
    """How far the fold-aware outputs are from the unfolded ones."""
    with unfolded(), torch.no_grad():
        wanted = _outputs(model, batch)
    return _divergence(_outputs(model, batch), wanted, _mask(batch))


def _outputs(model: nn.Module, batch: Inputs) -> Tensor | list[Tensor]:
    output = call_once(model, batch)
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.is_floating_point():
        return logits
    floats = [t for t in tensors_of(output) if t.is_floating_point()]
    if not floats:
        raise FoldError("distil: the model's outputs hold no float tensor to learn from; leave distil=0")
    return floats


def _divergence(got: Tensor | list[Tensor], wanted: Tensor | list[Tensor], mask: Tensor | None) -> Tensor:
    if isinstance(got, Tensor) and isinstance(wanted, Tensor):
        logs = F.log_softmax(got.float(), -1), F.log_softmax(wanted.float(), -1)
        each = F.kl_div(*logs, log_target=True, reduction="none").sum(-1)
        if mask is None or mask.shape != each.shape:
            return each.mean()
        return (each * mask).sum() / mask.sum().clamp(min=1)
    pairs = zip((t.float() for t in got), (t.float() for t in wanted), strict=True)
    return torch.stack([(g - w).square().sum() / w.square().sum().clamp(min=1e-30) for g, w in pairs]).mean()


def _mask(batch: Inputs) -> Tensor | None:
    """Which tokens count."""
    mask = batch.get("attention_mask") if not isinstance(batch, tuple) else None
    return mask.float() if isinstance(mask, Tensor) and mask.dim() == 2 else None
