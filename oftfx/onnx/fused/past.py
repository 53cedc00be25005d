"""The cache of one step of a decoder, which remembers what was in it before; needs transformers."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PastLayer(DynamicLayer):
    """A layer's keys and values.

    Attributes:
        before: keys and values that it began with.
        new: those that the step added.
    """

    before: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add to it; what attention without an operator of its own reads."""
        self.before, self.new = (self.keys, self.values), (key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)


@dataclass
class Step:
    """One call of a decoder.

    Attributes:
        cache: of `PastLayer`.
        mask: ``attention_mask (batch, past + sequence)``.
        rotary: the module that has the tables of rotations, where the operator rotates.
        lengths: what the operator takes for the lengths of its rows; made once.
        fused: indices of the layers whose attention was the operator.
        refused: why it must not be.
    """

    cache: DynamicCache
    mask: Tensor
    rotary: Any = None
    lengths: tuple[Tensor, Tensor] | None = None
    fused: set[int] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)


STEP: ContextVar[Step] = ContextVar("step of a decoder")
"""The step under way."""
