"""The loop: AdamW under a rate that rises and falls; stopped anywhere, it goes on as if it had not been."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import OftfxError
from oftfx.training.progress import resume, save_progress


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: optimiser steps in all, also those done before an interruption.
        rate: largest learning rate; it rises for ``warmup`` of the steps and falls in a line to nothing at the end.
        warmup: share of the steps.
        weight_decay: of AdamW. A rotation is drawn towards the identity by it.
        accumulate: calls of the loss whose gradients are averaged for a step.
        clip: largest norm of the gradient; None: as it is.
        every: steps between what is written to disk.
    """

    steps: int
    rate: float
    warmup: float = 0.1
    weight_decay: float = 0.0
    accumulate: int = 1
    clip: float | None = None
    every: int = 5

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = max(1, int(self.steps * self.warmup))
        return self.rate * min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))


def minimise(
    loss: Callable[[int], Tensor],
    parameters: Sequence[nn.Parameter],
    schedule: Schedule,
    *,
    folder: Path,
    report: Callable[[int, float], None],
) -> list[float]:
    """Minimise ``loss(call)``, whose calls are counted from 0 over all steps.

    Args:
        loss: the same for the same call.
        parameters: what trains.
        schedule: see there.
        folder: where the progress goes, every so many steps and when it is interrupted.
        report: called with (steps done, loss) after every step, and once for what was done before.

    Returns:
        The loss of every step.

    Raises:
        OftfxError: a loss is not finite (what is on disk is from before), or the folder holds another run's progress.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=schedule.rate, weight_decay=schedule.weight_decay)
    losses = resume(folder, parameters, optimizer)
    if losses:
        report(len(losses), losses[-1])
    saved = len(losses)
    try:
        while len(losses) < schedule.steps:
            losses.append(_step(loss, parameters, optimizer, schedule, len(losses)))
            if len(losses) % schedule.every == 0 or len(losses) == schedule.steps:
                save_progress(folder, parameters, optimizer, losses)
                saved = len(losses)
            report(len(losses), losses[-1])
    except KeyboardInterrupt:
        # Between two steps all is whole. Inside one only the optimiser's own update is not, and that is short.
        if saved < len(losses) and not _within_update(optimizer, len(losses)):
            save_progress(folder, parameters, optimizer, losses)
        raise
    return losses


def _step(
    loss: Callable[[int], Tensor],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    step: int,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate_at(step)
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for call in range(step * schedule.accumulate, (step + 1) * schedule.accumulate):
        value = loss(call) / schedule.accumulate
        value.backward()
        total += float(value.detach())
    if not math.isfinite(total):
        raise OftfxError(
            f"the loss of step {step + 1} is {total}; start again with a smaller learning rate than {schedule.rate:g}, "
            "or look at the data"
        )
    if schedule.clip is not None:
        nn.utils.clip_grad_norm_(parameters, schedule.clip)
    optimizer.step()
    return total


def _within_update(optimizer: torch.optim.Optimizer, done: int) -> bool:
    """Whether some parameters have had a step that others, or the list of losses, have not."""
    return {int(s["step"]) for s in optimizer.state.values() if "step" in s} != {done}
