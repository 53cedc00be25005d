"""A convolution network from end to end: clear words become bad scans, OFT learns to read them, the fold keeps it.

Every Conv2d and Linear of the recogniser in `oftfx.demo.ocr` gets a rotation. Training is on words of one corpus, the
figures are on words of another. An interrupted run goes on where its training stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import oftfx
from oftfx.demo import figures, ocr, words
from oftfx.terminal import render
from oftfx.training.minimise import Schedule, minimise

RULES = {
    # 36 divides every 3x3 kernel but the first: a block turns the 3x3 patches of four channels.
    nn.Conv2d: oftfx.OFT(36, on_indivisible="nearest"),
    nn.Linear: oftfx.OFT(32),
}
STEPS, RATE, SCANS, CLEAN = 100, 1e-3, 12, 4
TEST_WORDS = 400
COLUMNS = ("model", "scans: CER %", "words right %", "CTC loss", "clean: CER %", "CTC loss")

Bar = Callable[[str, int], Any]


@contextmanager
def silent(title: str, total: int) -> Iterator[Callable[[int, str], None]]:  # noqa: ARG001
    """A progress bar that nobody sees."""
    yield lambda done, remark: None  # noqa: ARG005


def run(
    out: Path,
    steps: int | None = None,
    quick: bool = False,
    say: Callable[[str], None] = print,
    bar: Bar = silent,
) -> dict[str, Any]:
    """Measure, transform, train, measure, fold, measure.

    Args:
        out: folder for checkpoints and figures; a run that it holds is continued.
        steps: training steps; 100, or 20 in a quick run.
        quick: fewer steps and a quarter of the test words.
        say: called with a line of text for the user.
        bar: opens a progress bar: ``with bar(title, total) as advance: advance(done, remark)``.

    Returns:
        The figures, which are also in ``results.json``.

    Raises:
        OftfxError: the folder holds a run of another size, or a package is missing.
    """
    steps = steps or (STEPS // 5 if quick else STEPS)
    test = words.read("test")[: TEST_WORDS // 4 if quick else TEST_WORDS]
    results = figures.read(out, {"steps": steps, "words": len(test)}, say)
    start = time.perf_counter()
    exam = Exam(test, results.setdefault("rows", {}), say)

    base = ocr.load()
    before = exam.sit("base", base)
    figures.write(out, results)
    plan = oftfx.plan(base, RULES, example_inputs=(exam.scans[:2],))
    say(str(plan))
    model = oftfx.transform(base, plan)
    results.update(sites=len(plan), trainable=plan.trainable)
    with bar(f"train {steps} steps of {SCANS + CLEAN} words", steps) as advance:
        results["losses"] = train(
            model, steps=steps, folder=out, report=lambda step, loss: advance(step, f"loss {loss:.3f}")
        )
    adapted = exam.sit("base + adapter", model)
    folded = oftfx.fold(model, calibration=[(exam.scans[:16],)])
    say(str(folded.report))
    after = exam.sit("folded", folded.model)

    rows = results["rows"]
    pairs = [(rows["base + adapter"][p], rows["folded"][p]) for p in ("scans", "clean")]
    results["agreement"] = {
        "loss": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "cer": max(abs(a["cer"] - b["cer"]) for a, b in pairs),
        "scores": _relative(after, adapted),
        "adapter": _relative(adapted, before),
    }
    results["seconds"] = time.perf_counter() - start
    figures.write(out, results)
    say(render("english_g2, words it was not trained on", COLUMNS, table_rows(results)))
    say(f"{results['seconds']:.0f} seconds; figures in {out / 'results.json'}")
    return results


class Exam:
    """The test words, clean and as bad scans.

    Args:
        test: the words.
        rows: where the figures of each model go, by name.
        say: called with a line of text for the user.
    """

    def __init__(self, test: list[str], rows: dict[str, Any], say: Callable[[str], None]) -> None:
        self.words, self.rows, self.say = test, rows, say
        self.clean = words.render(test)
        self.scans = words.render(test, words.SHIFTED)

    def sit(self, name: str, model: nn.Module) -> Tensor:
        """Enter the figures of a model; returns its scores on the scans."""
        scans, scores = ocr.measure(model, self.scans, self.words)
        clean, _ = ocr.measure(model, self.clean, self.words)
        self.rows[name] = {"scans": asdict(scans), "clean": asdict(clean)}
        self.say(
            f"  {name}: character error rate {100 * scans.cer:.2f} % on scans, {100 * clean.cer:.2f} % on clean words"
        )
        return scores


def train(model: nn.Module, *, steps: int, folder: Path, report: Callable[[int, float], None]) -> list[float]:
    """Train the active adapter on the mean CTC loss of scans and some clean words; returns the loss of every step.

    Args:
        model: a transformed recogniser; it is in eval mode afterwards.
        steps: optimiser steps in all, also those done before an interruption.
        folder: where checkpoints go.
        report: called with (steps done, loss) after every step.
    """
    corpus = words.read("train")

    def loss(step: int) -> Tensor:
        pictures, chosen = batch(corpus, step)
        return ocr.losses(model(pictures), chosen).mean()

    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # its statistics are the base model's
    losses = minimise(loss, oftfx.adapter_parameters(model), Schedule(steps, RATE), folder=folder, report=report)
    model.eval()
    return losses


def batch(corpus: list[str], step: int) -> tuple[Tensor, list[str]]:
    """Pictures and words of a training step: the same for the same step."""
    size = SCANS + CLEAN
    chosen = [corpus[(step * size + i) % len(corpus)] for i in range(size)]
    pictures = [words.render(chosen[:SCANS], words.SHIFTED, seed=step + 1), words.render(chosen[SCANS:])]
    return torch.cat(pictures), chosen


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the final table."""
    return [
        (
            name,
            f"{100 * row['scans']['cer']:.2f}",
            f"{100 * row['scans']['accuracy']:.1f}",
            f"{row['scans']['loss']:.5f}",
            f"{100 * row['clean']['cer']:.2f}",
            f"{row['clean']['loss']:.5f}",
        )
        for name, row in results["rows"].items()
    ]


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).double().norm() / expected.double().norm())
