"""A plain training loop with checkpoints; an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import oftfx
from oftfx.demo import text
from oftfx.errors import OftfxError
from oftfx.files import landing

EVERY = 5  # steps between checkpoints


def train(
    model: nn.Module,
    data: Tensor,
    *,
    steps: int,
    size: int,
    rate: float,
    folder: Path,
    report: Callable[[int, float], None],
    first: int = 0,
) -> list[float]:
    """Train the active adapter on next-token loss.

    Args:
        model: a transformed causal language model.
        data: ``(n, length)`` token ids.
        steps: optimiser steps in all, also those done before an interruption.
        size: sequences a step.
        rate: largest learning rate.
        folder: where checkpoints go.
        report: called with (steps done, loss) after every step.
        first: batches that earlier training has had.

    Returns:
        The loss of every step.
    """

    def loss(step: int) -> Tensor:
        ids = text.batch(data, first + step, size)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss

    model.train()
    losses = minimise(loss, oftfx.adapter_parameters(model), steps=steps, rate=rate, folder=folder, report=report)
    model.eval()
    return losses


def minimise(
    loss: Callable[[int], Tensor],
    parameters: list[nn.Parameter],
    *,
    steps: int,
    rate: float,
    folder: Path,
    report: Callable[[int, float], None],
) -> list[float]:
    """AdamW with linear warm-up and decay, and a checkpoint every few steps.

    Args:
        loss: the loss of a step; the same step must have the same batch.
        parameters: what trains.
        steps: see `train`, like the rest.
        rate: largest learning rate.
        folder: where checkpoints go.
        report: called after every step.

    Returns:
        The loss of every step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warm = max(1, steps // 10)
    losses = _resume(folder, parameters, optimizer)
    if losses:
        report(len(losses), losses[-1])
    for step in range(len(losses), steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        value = loss(step)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))
        report(step + 1, losses[-1])
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            _checkpoint(folder, parameters, optimizer, losses)
    return losses


def _checkpoint(
    folder: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    state = {
        "parameters": [p.detach() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "losses": losses,
    }
    with landing(folder, "training.pt", OftfxError) as made:
        torch.save(state, made / "training.pt")


def _resume(folder: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
    path = folder / "training.pt"
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"])
