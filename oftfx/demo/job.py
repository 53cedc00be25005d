"""The main job, stage by stage. Every finished stage is on disk, so starting again continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import oftfx
from oftfx.demo import figures, smollm, text
from oftfx.demo import perplexity as ppl
from oftfx.demo.train import train
from oftfx.files import write_whole
from oftfx.terminal import render

LENGTH, BATCH, RATE = 128, 4, 2.5e-4
FOLDS = ("keep", "float", "requantize", "calibrate")
COLUMNS = ("model", "runs in", "weights", "MiB", "perplexity", "gain kept %", "ms 1x128")


@dataclass(frozen=True)
class Size:
    """How much the job does: training steps, and blocks of 128 tokens, held out and for calibration."""

    steps: int
    held_out: int
    calibration: int


FULL, QUICK = Size(steps=60, held_out=40, calibration=64), Size(steps=6, held_out=4, calibration=8)


@dataclass
class Job:
    """One run of the demo in one folder.

    Args:
        folder: results, checkpoints and ONNX files.
        size: how much to do.
        say: called with a line of text for the user.
        bar: opens a progress bar: ``with bar(title, total) as advance: advance(done, remark)``.
    """

    folder: Path
    size: Size
    say: Callable[[str], None]
    bar: Callable[[str, int], Any]
    results: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns all results, which are also in ``results.json``.

        Raises:
            OftfxError: the folder holds a run of another size, or a package is missing.
        """
        self._read()
        start = time.perf_counter()
        with self._timed("load SmolLM2-135M-Instruct"):
            base, tokenizer = smollm.load()
            held_out = text.blocks(tokenizer, text.read("test"), LENGTH)[: self.size.held_out]
        self._row("float32 base", "torch", _dense_bytes(base), lambda: ppl.in_torch(base), held_out)
        with self._timed("quantize the linears to NF4"):
            smollm.quantize_nf4(base)
        model = self._transform(base)
        with oftfx.disable_adapters(model):
            self._row("NF4 base", "torch", _bytes(base), lambda: ppl.in_torch(model), held_out)
        data = text.blocks(tokenizer, text.read("train"), LENGTH)
        self._train(model, data)
        self._row("NF4 + adapter", "torch", _bytes(model), lambda: ppl.in_torch(model), held_out)
        oftfx.save_adapter(model, self.folder / "adapter")
        folded = {policy: self._fold(model, policy, held_out, data) for policy in FOLDS}
        self._generate(model, folded, tokenizer)
        example = {"input_ids": held_out[:2], "attention_mask": torch.ones_like(held_out[:2])}
        self._onnx("ONNX folded (float)", folded["float"], example, held_out)
        self._onnx("ONNX unfolded (NF4)", model, example, held_out)
        self.results["seconds"] = self.results.get("seconds", 0.0) + time.perf_counter() - start
        self._write()
        self.say(self.table())
        self.say(f"{self.results['seconds']:.0f} seconds in all; figures in {self.folder / 'results.json'}")
        return self.results

    # -- stages ---------------------------------------------------------------------------------

    def _transform(self, base: nn.Module) -> nn.Module:
        rules = {"all-linear": oftfx.OFT(32)}
        with self._timed("plan and transform"):
            plan = oftfx.plan(base, rules)
            model = oftfx.transform(base, plan)
        self.say(str(plan))
        self.results.update(sites=len(plan), trainable=plan.trainable, rung=plan.trace.rung)
        return model

    def _train(self, model: nn.Module, data: Tensor) -> None:
        title = f"train {self.size.steps} steps of {BATCH}x{LENGTH} tokens"
        with self.bar(title, self.size.steps) as advance:
            losses = train(
                model,
                data,
                steps=self.size.steps,
                size=BATCH,
                rate=RATE,
                folder=self.folder,
                report=lambda step, loss: advance(step, f"loss {loss:.3f}"),
            )
        self.results["losses"] = losses
        self._write()

    def _fold(self, model: nn.Module, policy: str, held_out: Tensor, data: Tensor) -> nn.Module:
        # Others only measure on these inputs; calibration learns from them, so it must not see what is held out.
        chosen = data[: self.size.calibration].split(BATCH) if policy == "calibrate" else [held_out[:2]]
        calibration = [{"input_ids": i, "attention_mask": torch.ones_like(i), "use_cache": False} for i in chosen]
        with self.bar(f"fold: {policy}", 210) as advance:
            result = oftfx.fold(
                model, quantized=policy, calibration=calibration, progress=lambda done, _: advance(done, "")
            )
        self.say(str(result.report))
        self.results.setdefault("folds", {})[policy] = {
            "survival": result.report.survival,
            "output_error": result.report.output_error,
        }
        write_whole(self.folder / f"fold_{policy}.json", result.report.to_json().encode())
        self._row(f"folded: {policy}", "torch", _bytes(result.model), lambda: ppl.in_torch(result.model), held_out)
        return result.model

    def _generate(self, model: nn.Module, folded: dict[str, nn.Module], tokenizer: Any) -> None:
        prompt = tokenizer("The Australian government announced", return_tensors="pt")
        same = {}
        with self._timed("generate 24 tokens, unfolded and folded"):
            first = _greedy(model, prompt)
            for policy in ("keep", "float"):
                same[policy] = torch.equal(_greedy(folded[policy], prompt), first)
        self.say("  " + tokenizer.decode(first[0], skip_special_tokens=True).replace("\n", " "))
        self.results["same_tokens"] = same

    def _onnx(self, name: str, model: nn.Module, example: dict[str, Tensor], held_out: Tensor) -> None:
        path = self.folder / (name.split()[1] + ".onnx")
        done = self.results.setdefault("exports", {})
        if name not in done or not path.exists():
            with self._timed(f"export {path.name} and verify it"):
                report = oftfx.export_onnx(model, path, example)
                logits = ppl.in_onnxruntime(path)
                other = held_out[:3, :77]  # another batch and length than the example's
                want, got = ppl.in_torch(model)(other), logits(other)
            done[name] = {
                "mib": report.nbytes / 2**20,
                "relative_error": max(c.relative_error for c in report.checks),
                "max_abs_logit_error": float((want - got).abs().max()),
                "same_argmax": bool((want.argmax(-1) == got.argmax(-1)).all()),
                "operators": report.operators,
            }
            self._write()
        self.say(
            "  ONNX Runtime against torch on 3x77 tokens: "
            f"largest logit error {done[name]['max_abs_logit_error']:.1e}, same argmax {done[name]['same_argmax']}"
        )
        self._row(name, "ONNX Runtime", int(done[name]["mib"] * 2**20), lambda: ppl.in_onnxruntime(path), held_out)

    # -- bookkeeping ----------------------------------------------------------------------------

    def _row(self, name: str, runs_in: str, nbytes: int, logits: Callable[[], ppl.Logits], held_out: Tensor) -> None:
        rows = self.results.setdefault("rows", {})
        if name not in rows:
            with self._timed(f"perplexity: {name}"):
                function = logits()
                rows[name] = {
                    "runs_in": runs_in,
                    "mib": nbytes / 2**20,
                    "perplexity": ppl.perplexity(function, held_out),
                    "ms": ppl.milliseconds(function, held_out[:1]),
                }
            self._write()
        self.say(f"  {name}: perplexity {rows[name]['perplexity']:.2f}")

    @contextmanager
    def _timed(self, title: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.say(f"{title} ({time.perf_counter() - start:.1f} s)")

    def _read(self) -> None:
        asked = {"steps": self.size.steps, "held_out": self.size.held_out}
        self.results.update(figures.read(self.folder, asked, self.say))

    def _write(self) -> None:
        figures.write(self.folder, self.results)

    def table(self) -> str:
        """The final table as text."""
        return render("SmolLM2-135M, held-out news text", COLUMNS, table_rows(self.results))


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the final table. "Gain kept" is the share of the adapter's gain in log-likelihood."""
    rows = results["rows"]
    base = torch.tensor(rows["NF4 base"]["perplexity"]).log()
    best = torch.tensor(rows["NF4 + adapter"]["perplexity"]).log()
    result: list[tuple[str, ...]] = []
    for name, row in rows.items():
        kept = float((base - torch.tensor(row["perplexity"]).log()) / (base - best))
        shown = "" if name in ("float32 base", "NF4 base") else f"{100 * kept:.1f}"
        kind = "float32" if "float" in name else "NF4"
        cells = (
            name,
            row["runs_in"],
            kind,
            f"{row['mib']:.0f}",
            f"{row['perplexity']:.2f}",
            shown,
            f"{row['ms']:.0f}",
        )
        result.append(cells)
    return result


def _greedy(model: nn.Module, prompt: Any) -> Tensor:
    with torch.no_grad():
        return model.eval().generate(**prompt, max_new_tokens=24, do_sample=False)  # type: ignore[operator]


def _dense_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _bytes(model: nn.Module) -> int:
    """Every stored tensor once; of quantized sites codes and scales."""
    from oftfx.formats.registry import format_of

    total, counted = 0, set()
    for module in model.modules():
        weight_format = format_of(module)
        if weight_format is not None and not weight_format.lossless:
            total += weight_format.nbytes(module)
            counted.add(id(module._parameters["weight"]))
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in counted:
            counted.add(id(tensor))
            total += tensor.numel() * tensor.element_size()
    return total
