"""Held-out perplexity, in torch and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""``(batch, length)`` token ids to ``(batch, length, vocabulary)`` logits."""


def in_torch(model: nn.Module) -> Logits:
    """Logits of a torch model, in eval mode."""

    def logits(ids: Tensor) -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    return logits


def in_onnxruntime(path: Path) -> Logits:
    """Logits of an ONNX file, on the CPU with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(ids: Tensor) -> Tensor:
        feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        return torch.from_numpy(session.run(["logits"], feed)[0])

    return logits


def perplexity(logits: Logits, data: Tensor, size: int = 4) -> float:
    """``exp`` of the mean negative log-likelihood of each next token, over ``data (n, length)``."""
    total, count = 0.0, 0
    for ids in data.split(size):
        scores = logits(ids)[:, :-1].flatten(0, 1).float()
        targets = ids[:, 1:].flatten()
        total += float(F.cross_entropy(scores, targets, reduction="sum"))
        count += targets.numel()
    return float(torch.tensor(total / count).exp())
