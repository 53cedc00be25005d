"""What a fold did to the model's outputs: relative error, and perplexity of language models. Batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from oftfx.model.running import Inputs, call, evaluating

_PIECE = 2**22


@dataclass(frozen=True)
class Measured:
    """Two models on the same inputs.

    Attributes:
        output_error: ``|y' - y| / |y|`` over all float outputs of all inputs.
        perplexity_before: ``exp`` of the mean negative log-likelihood of the next token, of the unfolded model; None
            where the model is no causal language model, or its inputs are not token ids.
        perplexity_after: of the folded model.
    """

    output_error: float
    perplexity_before: float | None = None
    perplexity_after: float | None = None


@torch.no_grad()
def measure(before: nn.Module, after: nn.Module, batches: Sequence[Inputs]) -> Measured:
    """Run both models in eval mode; memory is that of one batch's outputs, twice."""
    missed = whole = 0.0
    nll = [0.0, 0.0]
    count = 0
    for batch in batches:
        outputs = [_run(m, batch) for m in (before, after)]
        for old, new in zip(*(_floats(o) for o in outputs), strict=True):
            # In pieces: logits of a large vocabulary are the largest tensors there are.
            for a, b in zip(new.flatten().split(_PIECE), old.flatten().split(_PIECE), strict=True):
                missed += float((a.double() - b.double()).square().sum())
                whole += float(b.double().square().sum())
        losses = [_next_token(m, batch, o) for m, o in zip((before, after), outputs, strict=True)]
        if losses[0] is not None and losses[1] is not None:
            nll = [a + b for a, b in zip(nll, (losses[0][0], losses[1][0]), strict=True)]
            count += losses[0][1]
    error = math.sqrt(missed / whole) if whole else math.sqrt(missed)
    if not count:
        return Measured(error)
    return Measured(error, *(_exp(n / count) for n in nll))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf  # of a model gone wrong


def _run(model: nn.Module, batch: Inputs) -> Any:
    with evaluating(model):
        return call(model, batch)


def _floats(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _next_token(model: nn.Module, batch: Inputs, output: Any) -> tuple[float, int] | None:
    """Sum of negative log-likelihoods and number of predicted tokens; None where there is no such thing."""
    config, generates = getattr(model, "config", None), getattr(model, "can_generate", None)
    if not callable(generates) or not generates() or getattr(config, "is_encoder_decoder", False):
        return None
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    logits = getattr(output, "logits", None)
    if ids is None or logits is None or logits.shape[:-1] != ids.shape:
        return None
    wanted = ids[:, 1:].clone()
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.shape == ids.shape:
        wanted[mask[:, 1:] == 0] = -100
    losses = [
        F.cross_entropy(row.float(), targets, ignore_index=-100, reduction="sum")
        for row, targets in zip(logits[:, :-1].flatten(0, -3), wanted.flatten(0, -2), strict=True)
    ]
    return float(sum(losses)), int((wanted != -100).sum())
