"""What a fold did to the model's outputs: relative error, and perplexity of language models. Batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from oftfx.folding.inputs import is_of_input, not_taken
from oftfx.folding.peers import Peers
from oftfx.model.running import Inputs, call_once, evaluating, tensors_of
from oftfx.precision import squared_error


@dataclass(frozen=True)
class Measured:
    """Two models on the same inputs.

    Attributes:
        output_error: ``|y' - y| / |y|`` over all float outputs of all inputs.
        perplexity_before: ``exp`` of the mean negative log-likelihood of the next token, of the unfolded model; None
            where the model is no causal language model, or its inputs are not token ids.
        perplexity_after: of the folded model.
        effect: ``|y - y0| / |y|`` with ``y0`` the outputs without the adapters: what an error is to be compared with.
        perplexity_base: without the adapters.
    """

    output_error: float
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    effect: float | None = None
    perplexity_base: float | None = None

    def __post_init__(self) -> None:
        if (self.perplexity_before is None) != (self.perplexity_after is None):
            raise ValueError("a perplexity before needs one after, and the other way round")
        if any(p is not None and p <= 0 for p in (self.perplexity_base, self.perplexity_before, self.perplexity_after)):
            raise ValueError("a perplexity is positive")

    @property
    def gain_kept(self) -> float | None:
        """Share of the adapters' gain in log-likelihood that the folded model has; None where there was none."""
        perplexities = self.perplexity_base, self.perplexity_before, self.perplexity_after
        if None in perplexities or not all(map(math.isfinite, perplexities)):  # type: ignore[arg-type]
            return None
        base, before, after = (math.log(p) for p in perplexities)  # type: ignore[arg-type]
        return (base - after) / (base - before) if base > before else None


@dataclass(frozen=True)
class Seen:
    """What a model made of one batch.

    Attributes:
        floats: its float outputs.
        loss: sum of negative log-likelihoods and number of predicted tokens, of a causal language model.
    """

    floats: tuple[Tensor, ...]
    loss: tuple[float, int] | None


def on_cpu(pair: tuple[Seen, Seen]) -> tuple[Seen, Seen]:
    """To be kept while the model changes."""
    first, second = (replace(seen, floats=tuple(t.cpu() for t in seen.floats)) for seen in pair)
    return first, second


@torch.no_grad()
def see(model: nn.Module, batch: Inputs) -> Seen:
    """Run a model in eval mode, without a cache of keys and values."""
    with evaluating(model):
        try:
            output = call_once(model, batch)
        except Exception as error:
            if is_of_input(error):
                raise not_taken(batch, error) from error
            raise
    floats = tuple(t.detach() for t in tensors_of(output) if t.is_floating_point())
    return Seen(floats, _next_token(model, batch, output))


def measure(
    before: Iterable[tuple[Seen, Seen]], after: nn.Module, batches: Sequence[Inputs], peers: Peers | None = None
) -> Measured | None:
    """Compare a model with what another has made of the same batches; of a generator, one batch at a time.

    None where there is nothing to compare: no output is a float tensor.

    Args:
        before: with the adapters, and without.
        after: the folded model.
        batches: the inputs.
        peers: processes that measure the same models on inputs of their own: on those of all.
    """
    compared = count = missed = moved = whole = 0.0
    nll = [0.0, 0.0, 0.0]
    for batch, (old, base) in zip(batches, before, strict=True):
        new = see(after, batch)
        compared += len(new.floats)
        for a, b, c in zip(new.floats, old.floats, base.floats, strict=True):
            error, size = squared_error(a.to(b.device), b)
            missed, whole = missed + error, whole + size
            moved += squared_error(c.to(b.device), b)[0]
        losses = base.loss, old.loss, new.loss
        if None not in losses:
            nll = [n + loss[0] for n, loss in zip(nll, losses, strict=True)]  # type: ignore[index]
            count += losses[1][1]  # type: ignore[index]
    figures = (missed, whole, moved, *nll, count, compared)
    missed, whole, moved, *nll, count, compared = (peers or Peers()).sums("errors of the outputs", figures)
    if not compared:
        return None
    error, effect = (math.sqrt(part / whole) if whole else math.sqrt(part) for part in (missed, moved))
    if not count:
        return Measured(error, effect=effect)
    without, unfolded, folded = (_exp(n / count) for n in nll)
    return Measured(error, unfolded, folded, effect, without)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf  # of a model gone wrong


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
