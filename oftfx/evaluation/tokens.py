"""Greedy tokens of a model in torch, and how far others follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.precision import relative_error


@dataclass(frozen=True)
class Expected:
    """What a model says to a prompt.

    Attributes:
        prompt: token ids.
        tokens: the likeliest one after the other.
        margins: by how much the logit of each was above the second best.
        logits: at each of these places, ``(len(tokens), vocabulary)`` float32.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    logits: Tensor

    @property
    def whole(self) -> Tensor:
        """The prompt and all tokens but the last, ``(1, n)``: what a causal model reads to say each of them."""
        return torch.tensor([[*self.prompt, *self.tokens[:-1]]])


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], count: int) -> Expected:
    """The tokens that a causal language model adds to a prompt, each by a forward over all before it.

    Args:
        model: in eval mode; of transformers.
        prompt: token ids, one at least.
        count: how many to add; nothing stops earlier.
    """
    device = next(model.parameters()).device
    given = torch.tensor([list(prompt)], device=device)
    rows, tokens, margins = [], [], []
    for _ in range(count):
        logits = model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits[0, -1].float()
        best = logits.topk(2)
        rows.append(logits.cpu())
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        given = torch.cat([given, best.indices[:1].unsqueeze(0)], 1)
    return Expected(tuple(prompt), tuple(tokens), tuple(margins), torch.stack(rows))


@dataclass(frozen=True)
class Followed:
    """How far another follows what is expected.

    Attributes:
        expected: what it should say.
        tokens: what it says.
        error: relative error of the logits at these places, Frobenius; None where only tokens were given.
        effect: how far the adapter moves them, relative to the same; None where there is no adapter.
        like_base: whether these are the tokens of the base without the adapter; None where there is no adapter.
    """

    expected: Expected
    tokens: tuple[int, ...]
    error: float | None = None
    effect: float | None = None
    like_base: bool | None = None

    @property
    def same(self) -> int:
        """How many tokens from the first on are the expected ones."""
        pairs = zip(self.tokens, self.expected.tokens, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.tokens), len(self.expected.tokens)))

    @property
    def is_equal(self) -> bool:
        """Whether all tokens are."""
        return self.tokens == self.expected.tokens

    @property
    def margin(self) -> float | None:
        """How sure the expecting model was of the first token that is another; None where none is."""
        return None if self.is_equal or self.same >= len(self.expected.tokens) else self.expected.margins[self.same]


@dataclass(frozen=True)
class Bare:
    """What the base without the adapter says.

    Attributes:
        own: its own tokens; None where others are compared by logits, which need none.
        logits: over the tokens that are expected.
    """

    own: Expected | None
    logits: Tensor


@torch.no_grad()
def bare(model: nn.Module, own: Expected | None, expected: Expected) -> Bare:
    """Of a model without adapters."""
    ids = expected.whole.to(next(model.parameters()).device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return Bare(own, logits[0, -len(expected.tokens) :].float().cpu())


def follow(expected: Expected, logits: Tensor, base: Bare | None = None) -> Followed:
    """Tokens out of logits over ``expected.whole``, ``(1, n, vocabulary)``.

    Up to its first other token, what a model says after the expected tokens is what it says after its own.
    """
    there = logits[0, -len(expected.tokens) :].float().cpu()
    tokens = tuple(int(i) for i in there.argmax(-1))
    error = relative_error(there, expected.logits)
    return _followed(expected, tokens, error, base)


def follow_tokens(expected: Expected, tokens: Sequence[int], base: Bare | None = None) -> Followed:
    """The same of a server that gives tokens only."""
    return _followed(expected, tuple(tokens), None, base)


def _followed(expected: Expected, tokens: tuple[int, ...], error: float | None, base: Bare | None) -> Followed:
    if base is None:
        return Followed(expected, tokens, error)
    effect = relative_error(base.logits, expected.logits)
    # Over the expected tokens a model cannot go its own way: the base says there what its logits say.
    alike = base.own.tokens if error is None and base.own is not None else tuple(map(int, base.logits.argmax(-1)))
    return Followed(expected, tokens, error, effect, tokens == alike)
