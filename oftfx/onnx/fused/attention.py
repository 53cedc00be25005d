"""A decoder's attention as ``com.microsoft::GroupQueryAttention``, which rotates, keeps the cache and attends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.onnx.fused.past import STEP, PastLayer, Step

NAME = "oftfx_grouped"
"""What transformers calls this attention: ``config._attn_implementation``."""

_OTHER = {
    "sliding_window": "a sliding window",
    "softcap": "capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias of positions",
}
"""Arguments of transformers' attention that make it another function, and what they mean."""


class FusedRotary(nn.Module):
    """In the place of a model's rotary embedding: the identity, for the operator rotates by its tables.

    Args:
        cos: ``(positions, rotated / 2)``.
        sin: the same.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """``cos, sin (1, 1, rotated)`` of no rotation."""
        STEP.get().rotary = self
        one = x.new_ones(1, 1, 2 * self.cos.shape[1])
        return one, torch.zeros_like(one)

    def rotated(self, x: Tensor, first: int) -> Tensor:
        """``x (batch, heads, sequence, head)`` of the positions from ``first``, as the operator rotates it."""
        half = self.cos.shape[1]
        cos, sin = (t[first : first + x.shape[2]] for t in (self.cos, self.sin))
        low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], -1)


def register() -> None:
    """Make transformers know this attention; only models whose config names it have it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def _mask(*_args: Any, mask_function: Callable[..., Any], **_kwargs: Any) -> None:
    """None: the operator knows no mask but the lengths of the rows. Refuses what is not simply causal."""
    first, second, far = torch.tensor(0), torch.tensor(1), torch.tensor(10**7)
    try:
        causal = bool(mask_function(first, first, far, first)) and not mask_function(first, first, first, second)
    except IndexError:
        causal = False  # it looks up more than places
    if not causal:
        STEP.get().refused.append("its mask is not simply causal")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,  # noqa: ARG001
    value: Tensor,  # noqa: ARG001
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it, ``query (batch, heads, sequence, head)`` to ``(batch, sequence, heads, head)``."""
    step = STEP.get()
    step.refused += [f"it has {what}" for name, what in _OTHER.items() if more.get(name) is not None]
    index: Any = module.layer_idx
    layer: Any = step.cache.layers[index]
    step.fused.add(index)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    run = _operator if torch.onnx.is_in_onnx_export() else _in_torch
    return run(step, layer, query, scale), None


def _operator(step: Step, layer: PastLayer, query: Tensor, scale: float) -> Tensor:
    batch, heads, length, head = query.shape
    keys, values = layer.new
    tables = (step.rotary.cos, step.rotary.sin) if step.rotary is not None else ()
    flat = [x.transpose(1, 2).reshape(batch, length, -1) for x in (query, keys, values)]
    before = layer.before
    longer = (batch, keys.shape[1], before[0].shape[2] + length, head)
    y, layer.keys, layer.values = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (*flat, *before, *_lengths(step), *tables),
        {
            "num_heads": heads,
            "kv_num_heads": keys.shape[1],
            "scale": scale,
            "do_rotary": int(bool(tables)),
            "rotary_interleaved": 0,
        },
        dtypes=(query.dtype,) * 3,
        shapes=((batch, length, heads * head), longer, longer),
        version=1,
    )
    return y.reshape(batch, length, heads, head)


def _lengths(step: Step) -> tuple[Tensor, Tensor]:
    """Real tokens of each row less one, and the length of the longest row with its padding; int32.

    The operator takes a row's tokens to be its first: one that is padded at the left would get wrong positions and
    attend to padding, without an error. There the graph looks up a place that is not there, which is an error.
    """
    if step.lengths is None:
        mask = step.mask
        present = torch.zeros(1, dtype=torch.int64).index_select(0, 1 - mask[:, 0])
        last = mask.sum(1) - 1 + present
        shape = torch.onnx.ops.symbolic("Shape", (mask,), {"start": 1, "end": 2}, dtype=torch.int64, shape=(1,))
        step.lengths = last.to(torch.int32), shape.to(torch.int32)
    return step.lengths


def _in_torch(step: Step, layer: PastLayer, query: Tensor, scale: float) -> Tensor:
    """What the operator computes without padding."""
    (old_keys, old_values), (keys, values) = layer.before, layer.new
    past, length = old_keys.shape[2], query.shape[2]
    if step.rotary is not None:
        query, keys = (step.rotary.rotated(x, past) for x in (query, keys))
    layer.keys, layer.values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
    repeated = query.shape[1] // keys.shape[1]
    every = [x.repeat_interleave(repeated, 1) for x in (layer.keys, layer.values)]
    ahead = torch.ones(length, past + length, dtype=torch.bool, device=query.device).triu(past + 1)
    scores = (query @ every[0].transpose(2, 3) * scale).masked_fill(ahead, float("-inf"))
    return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ every[1]).transpose(1, 2)
