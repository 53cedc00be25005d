"""How fast models are beside each other: a prompt, a token, a training step."""

from __future__ import annotations

import inspect
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.switch import adapter_parameters
from oftfx.errors import AdapterError, OftfxError
from oftfx.evaluation.interleaved import timed
from oftfx.terminal import render

WORK = ("prompt", "token", "training step")
COLUMNS = ("model", *(f"{name}{unit}" for name in WORK for unit in (", ms", "")), "MiB")


@dataclass(frozen=True)
class Speed:
    """One model.

    Attributes:
        name: of it.
        seconds: median time of each kind of work.
        ratio: the same to that of the first model, as the median of the ratios of its rounds.
        why_not: for kinds of work that it cannot do, the reason.
        nbytes: of its weights; None where that is not known.
    """

    name: str
    seconds: Mapping[str, float]
    ratio: Mapping[str, float]
    why_not: Mapping[str, str]
    nbytes: int | None


@dataclass(frozen=True)
class Speeds:
    """Some models on one machine.

    Attributes:
        rows: a model each; the first is what others are held against.
        prompt: tokens of the prompt, and before the token.
        batch: rows of a training step, of as many tokens.
        threads: that torch had.
        device: that the models are on.
    """

    rows: tuple[Speed, ...]
    prompt: int
    batch: int
    threads: int
    device: str

    def table(self) -> str:
        """A row a model (needs the ``report`` extra)."""
        where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        title = (
            f"A prompt of {self.prompt} tokens, a token behind it, a training step of {self.batch} times that; {where}"
        )
        cells = [[r.name, *(c for w in WORK for c in _cells(r, w)), _mebibytes(r.nbytes)] for r in self.rows]
        return render(title, COLUMNS, cells)

    def to_json(self) -> str:
        """All figures as JSON text."""
        return json.dumps(asdict(self), indent=1)


def speeds(
    models: Mapping[str, nn.Module],
    *,
    prompt: int = 128,
    batch: int = 4,
    rounds: int = 7,
    nbytes: Mapping[str, int] | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> Speeds:
    """Time causal language models of transformers on random tokens, all in turn in every round.

    A training step is a forward and a backward; besides the adapter's parameters its gradient goes to the embedded
    tokens, also of the base, so that a ratio is to a step that only passes gradients through the frozen model.

    Args:
        models: by name, the base first.
        prompt: tokens.
        batch: rows of a training step.
        rounds: how often each is timed.
        nbytes: size of each one's weights.
        report: called with (what is done, how much, of how much).

    Raises:
        OftfxError: no model can do any of the work.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from oftfx.evaluation.speed import speeds
        >>> sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).requires_grad_(False)
        >>> found = speeds({"base": model}, prompt=8, batch=2, rounds=1)
        >>> [found.rows[0].ratio[work] for work in ("prompt", "token", "training step")]
        [1.0, 1.0, 1.0]
    """
    base = next(iter(models))
    show = report or (lambda *_: None)
    times: dict[str, dict[str, list[float]]] = {}
    why_not: dict[str, dict[str, str]] = {name: {} for name in models}
    makers: dict[str, Callable[[nn.Module, int], Callable[[], object]]]
    makers = dict(zip(WORK, (_prompt, _token, partial(_step, batch=batch)), strict=True))
    for work, make in makers.items():
        functions: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            try:
                functions[name] = make(model, prompt)
                functions[name]()
            except Exception as error:  # a model's own code, which need not have caches, or gradients
                functions.pop(name, None)
                why_not[name][work] = f"{type(error).__name__}: {error}".splitlines()[0]
        if functions:
            advance = partial(_of, show, work, len(functions) * (rounds + 1))
            times[work] = timed(functions, rounds=rounds, report=advance)
    if not times:
        raise OftfxError(f"{base} runs none of this: {next(iter(why_not[base].values()))}")
    rows = [
        Speed(
            name,
            {w: statistics.median(t[name]) for w, t in times.items() if name in t},
            {w: _ratio(t[name], t[base]) for w, t in times.items() if name in t and base in t},
            why_not[name],
            None if nbytes is None else nbytes.get(name),
        )
        for name in models
    ]
    device = next(models[base].parameters()).device.type
    return Speeds(tuple(rows), prompt, batch, torch.get_num_threads(), device)


def _of(show: Callable[[str, int, int], None], work: str, calls: int, done: int) -> None:
    show(work, done, calls)


def _ratio(mine: list[float], theirs: list[float]) -> float:
    """Round by round, so that what else the machine does in a round hits both."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def _ids(model: nn.Module, rows: int, length: int) -> Tensor:
    config: Any = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    return torch.randint(text.vocab_size, (rows, length), generator=generator).to(next(model.parameters()).device)


def _prompt(model: nn.Module, prompt: int) -> Callable[[], object]:
    ids = _ids(model, 1, prompt)

    @torch.no_grad()
    def run() -> None:
        model.eval()
        model(input_ids=ids, use_cache=False)
        _wait(ids)

    return run


def _token(model: nn.Module, prompt: int) -> Callable[[], object]:
    """Of the cache only the prompt is left behind each token, so all are as long."""
    ids = _ids(model, 1, prompt + 1)
    named = inspect.signature(model.forward).parameters
    name = "past_key_values" if "past_key_values" in named and "cache" not in named else "cache"
    model.eval()
    with torch.no_grad():
        found = model(input_ids=ids[:, :prompt], use_cache=True)
    cache = getattr(found, name, None) or found.past_key_values

    @torch.no_grad()
    def run() -> None:
        model.eval()
        model(input_ids=ids[:, prompt:], use_cache=True, **{name: cache})
        cache.crop(-1)
        _wait(ids)

    return run


def _step(model: nn.Module, prompt: int, batch: int) -> Callable[[], object]:
    ids = _ids(model, batch, prompt)
    try:
        parameters = list(adapter_parameters(model))
    except AdapterError:  # it has none
        parameters = []

    def run() -> None:
        model.train()
        with torch.no_grad():
            embedded = model.get_input_embeddings()(ids)  # type: ignore[operator]
        embedded = embedded.detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
        for parameter in parameters:
            parameter.grad = None
        _wait(ids)
        model.eval()

    return run


def _wait(on: Tensor) -> None:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)


def _cells(row: Speed, work: str) -> tuple[str, str]:
    if work not in row.seconds:
        return "no", ""
    return f"{row.seconds[work] * 1e3:.1f}", f"{row.ratio[work]:.2f}" if work in row.ratio else ""


def _mebibytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**20:,.1f}"
