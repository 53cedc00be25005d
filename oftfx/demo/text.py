"""Real text: the Lee news corpus (ABC news, split by its authors), read out of the package ``gensim``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from oftfx.demo.smollm import package_folder
from oftfx.streaming.texts import blocks as blocks

FILES = {"train": "lee_background.cor", "test": "lee.cor"}


def read(split: Literal["train", "test"]) -> list[str]:
    """One news article a string."""
    path = package_folder("gensim") / "test" / "test_data" / FILES[split]
    return [line for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]


def batch(data: Tensor, step: int, size: int, seed: int = 0) -> Tensor:
    """Batch of a training step: the same for the same step, so an interrupted run goes on as if it had not been."""
    per_epoch = len(data) // size
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + epoch))
    return data[order[index * size : (index + 1) * size]]
