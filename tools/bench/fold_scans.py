"""The convolution recogniser of `oftfx.demo.ocr` with int8 linear layers, for fold quality."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.demo import ocr, ocr_job, words
from tools.bench.fold_models import Task

WORDS, CALIBRATION = 200, 64


class Recogniser(Task):
    """english_g2 on bad scans of words. Its convolutions and LSTMs are floats in every base: no format that is known
    here quantizes a convolution."""

    name, metric, unit = "english_g2", "CTC loss on scans", "words"
    rates, aware_steps = (5e-4, 1e-3, 2e-3), 0
    rules, convention = ocr_job.RULES, "oftfx"
    amount = WORDS

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.base = ocr.load()
        self.test = words.read("test")[:WORDS]
        self.scans = words.render(self.test, words.SHIFTED)
        self.corpus = words.read("train")
        # Words that training does not come to.
        start = 200 * (ocr_job.SCANS + ocr_job.CLEAN) + seed * CALIBRATION
        chosen = [self.corpus[i % len(self.corpus)] for i in range(start, start + CALIBRATION)]
        pictures = words.render(chosen, words.SHIFTED, seed=1000 + seed)
        self.calibration = [(part,) for part in pictures.split(8)]
        self.other = []

    def chosen(self, fqn: str, module: nn.Module) -> bool:  # noqa: ARG002
        """Every Linear."""
        return type(module) is nn.Linear

    def train_mode(self, model: nn.Module) -> None:
        """Statistics of batches stay the base model's."""
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """The mean CTC loss of scans and some clean words."""
        pictures, chosen = ocr_job.batch(self.corpus, step + 1000 * self.seed)
        return ocr.losses(model(pictures), chosen).mean()

    def judged(self, model: nn.Module) -> float:
        """The same as `outputs`."""
        return self.outputs(model)

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> float:
        """The mean CTC loss of held-out words as scans."""
        parts = range(0, WORDS, 50)
        losses = [ocr.losses(model(self.scans[i : i + 50]), self.test[i : i + 50]).mean() for i in parts]
        return float(torch.stack(losses).mean())

    def compare(self, base: Any, adapted: Any, folded: Any) -> dict[str, float]:
        """The loss, and share of its gain."""
        return {"score": folded, "kept": (base - folded) / (base - adapted)}
