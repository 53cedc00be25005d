"""Real text: the Lee news corpus (ABC news, split by its authors), read out of the package ``gensim``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from oftfx.demo.smollm import package_folder

FILES = {"train": "lee_background.cor", "test": "lee.cor"}


def read(split: Literal["train", "test"]) -> list[str]:
    """One news article a string."""
    path = package_folder("gensim") / "test" / "test_data" / FILES[split]
    return [line for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]


def blocks(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """All articles in a row, cut into ``(n, length)`` token ids; a rest shorter than a block is left out."""
    end = tokenizer.eos_token_id
    stream = [t for text in texts for t in [*tokenizer(text)["input_ids"], end]]
    count = len(stream) // length
    return torch.tensor(stream[: count * length], dtype=torch.long).view(count, length)


def batch(data: Tensor, step: int, size: int, seed: int = 0) -> Tensor:
    """Batch of a training step: the same for the same step, so an interrupted run goes on as if it had not been."""
    per_epoch = len(data) // size
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + epoch))
    return data[order[index * size : (index + 1) * size]]
