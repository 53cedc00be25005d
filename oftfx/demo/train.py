"""Next-token training of the demo; an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import oftfx
from oftfx.demo import text
from oftfx.training.minimise import Schedule, minimise


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
    losses = minimise(loss, oftfx.adapter_parameters(model), Schedule(steps, rate), folder=folder, report=report)
    model.eval()
    return losses
