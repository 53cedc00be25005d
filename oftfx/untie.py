"""Tell transformers that a weight is no longer shared, or loading a saved model would share it again."""

from __future__ import annotations

import torch.nn as nn


def untie(model: nn.Module, name: str) -> None:
    """Take a parameter out of the model's list of tied weights."""
    config = getattr(model, "config", None)
    tied = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(tied, dict) or not any(name in pair for pair in tied.items()):
        return
    model.all_tied_weights_keys = {k: v for k, v in tied.items() if name not in (k, v)}  # type: ignore[assignment]
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
