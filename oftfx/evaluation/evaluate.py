"""Models side by side on the same text: how well they predict it, how alike they are, how fast, how large."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from oftfx.errors import OftfxError
from oftfx.evaluation.interleaved import ratios
from oftfx.evaluation.perplexity import Logits
from oftfx.formats.registry import format_of
from oftfx.terminal import render

COLUMNS = ("model", "perplexity", "gain kept", "same next token", "divergence", "time", "MiB")


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: of it.
        perplexity: on the held-out text: ``exp`` of the mean negative log-likelihood of the next token.
        gain_kept: share of what the unfolded adapter gains over the base in log-likelihood; None where it gains nothing
            or none is given.
        agreement: share of the tokens whose likeliest next one is that of the reference.
        divergence: mean Kullback-Leibler divergence of its next-token distribution from the reference's, in nats.
        time: median time of a forward, to the base's; None where it was not timed.
        nbytes: of its weights; None where that is not known.
    """

    name: str
    perplexity: float
    gain_kept: float | None
    agreement: float
    divergence: float
    time: float | None
    nbytes: int | None


@dataclass(frozen=True)
class Evaluation:
    """Some models on one text.

    Attributes:
        rows: a model each; the first is the base.
        reference: the name of the one that others are held against: the unfolded adapter, or the base.
        tokens: how many were predicted.
    """

    rows: tuple[Row, ...]
    reference: str
    tokens: int

    def table(self) -> str:
        """A row a model (needs the ``report`` extra)."""
        return render(
            f"{self.tokens:,} held-out tokens, held against {self.reference}", COLUMNS, map(_cells, self.rows)
        )

    def to_json(self) -> str:
        """All figures as JSON text."""
        return json.dumps(asdict(self), indent=1)


@torch.no_grad()
def evaluate(
    models: Mapping[str, Logits],
    data: Tensor,
    *,
    adapted: str | None = None,
    nbytes: Mapping[str, int] | None = None,
    rounds: int = 5,
    batch: int = 4,
    report: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Run all models over the same tokens.

    Args:
        models: by name, the base first.
        data: ``(n, length)`` token ids.
        adapted: name of the one with the unfolded adapter; others are held against it, else against the base.
        nbytes: size of each one's weights.
        rounds: how often each is timed, all in turn; 0: not at all.
        batch: rows of a forward.
        report: called with (what is done, how much, of how much).

    Raises:
        OftfxError: there is no text, or a model has another vocabulary.
    """
    if not data.numel():
        raise OftfxError("there is no text to evaluate on")
    base = next(iter(models))
    reference = adapted or base
    show = report or (lambda *_: None)
    parts = data.split(batch)
    sums = {name: [0.0, 0.0, 0.0] for name in models}
    for done, ids in enumerate(parts, 1):
        scores = {name: logits(ids)[:, :-1].float().flatten(0, 1) for name, logits in models.items()}
        target, there = ids[:, 1:].flatten(), F.log_softmax(scores[reference], -1)
        for name, found in scores.items():
            if found.shape != there.shape:
                raise OftfxError(f"{name} gives logits {tuple(found.shape)}, {reference} {tuple(there.shape)}")
            here = F.log_softmax(found, -1)
            total = sums[name]
            total[0] += float(F.nll_loss(here, target, reduction="sum"))
            total[1] += int((here.argmax(-1) == there.argmax(-1)).sum())
            total[2] += float(F.kl_div(here, there, log_target=True, reduction="sum"))
        show("evaluate", done, len(parts))
    tokens = data.shape[0] * (data.shape[1] - 1)
    times: dict[str, float] = {}
    if rounds:
        calls = len(models) * (rounds + 1)
        functions = {name: partial(logits, data[:1]) for name, logits in models.items()}
        times = ratios(functions, base, rounds=rounds, report=lambda done: show("time", done, calls))
    losses = {name: total[0] / tokens for name, total in sums.items()}
    gain = losses[base] - losses[reference]
    rows = [
        Row(
            name,
            math.exp(min(losses[name], 700.0)),
            (losses[base] - losses[name]) / gain if gain > 0 else None,
            sums[name][1] / tokens,
            sums[name][2] / tokens,
            times.get(name),
            None if nbytes is None else nbytes.get(name),
        )
        for name in models
    ]
    return Evaluation(tuple(rows), reference, tokens)


def stored_bytes(model: nn.Module) -> int:
    """Every stored tensor once; of quantized layers codes and scales."""
    total, counted = 0, set[int]()
    for module in model.modules():
        known = format_of(module)
        if known is not None and not known.lossless:
            total += known.nbytes(module)
            counted |= {id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in counted:
            counted.add(id(tensor))
            total += tensor.numel() * tensor.element_size()
    return total


def file_bytes(path: Path) -> int:
    """Of an ONNX file and the weights beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.perplexity:.3f}",
        "" if row.gain_kept is None else f"{row.gain_kept:.1%}",
        f"{row.agreement:.1%}",
        f"{row.divergence:.2e}",
        "" if row.time is None else f"{row.time:.2f}",
        "" if row.nbytes is None else f"{row.nbytes / 2**20:.1f}",
    )
