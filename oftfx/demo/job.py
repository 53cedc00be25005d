"""The main job, stage by stage. Every finished stage is on disk, so starting again continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import oftfx
from oftfx.demo import figures, smollm, text
from oftfx.demo.job_table import COLUMNS, table_rows
from oftfx.demo.train import train
from oftfx.evaluation import perplexity as ppl
from oftfx.evaluation.evaluate import stored_bytes
from oftfx.evaluation.interleaved import ratios
from oftfx.files import write_whole
from oftfx.model.structure import structural_copy
from oftfx.terminal import render

LENGTH, BATCH, RATE = 128, 4, 2.5e-4
TRAINED = "calibrate, scales trained"
FOLDS = ("keep", "float", "requantize", "calibrate", TRAINED)
REFERENCE = "float32 base"


@dataclass(frozen=True)
class Size:
    """How much the job does: steps, and steps through the fold; blocks of 128 tokens, held out and to calibrate by;
    timed forwards.
    """

    steps: int
    aware_steps: int
    held_out: int
    calibration: int
    rounds: int


FULL = Size(steps=60, aware_steps=40, held_out=40, calibration=64, rounds=11)
QUICK = Size(steps=6, aware_steps=4, held_out=4, calibration=8, rounds=3)


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
    _logits: dict[str, Callable[[], ppl.Logits]] = field(default_factory=dict)
    _calibrated: oftfx.FoldResult | None = None

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns all results, which are also in ``results.json``.

        Raises:
            OftfxError: the folder holds a run of another size, or a package is missing.
        """
        self._read()
        if "time_ratios" not in self.results:
            self._stages()
        self.say(self.table())
        seconds = sum(self.results["stage_seconds"].values())
        self.say(f"{seconds:.0f} seconds in all; figures in {self.folder / 'results.json'}")
        return self.results

    # -- stages ---------------------------------------------------------------------------------

    def _stages(self) -> None:
        with self._timed("load SmolLM2-135M-Instruct"):
            base, tokenizer = smollm.load()
            held_out = text.blocks(tokenizer, text.read("test"), LENGTH)[: self.size.held_out]
            data = text.blocks(tokenizer, text.read("train"), LENGTH)
        self._torch_row(REFERENCE, lambda: base, held_out)
        with self._timed("quantize the linears to NF4"):
            quantized = smollm.hold_still(smollm.quantize_nf4(structural_copy(base)))
        self._torch_row("NF4 base", lambda: quantized, held_out)
        model = self._transform(quantized)
        self._train(model, data)
        self._torch_row("NF4 + adapter", lambda: model, held_out)
        oftfx.save_adapter(model, self.folder / "adapter")
        folded: dict[str, Callable[[], nn.Module]] = {}
        for policy in FOLDS:
            folded[policy] = cache(partial(self._fold, model, policy, quantized, held_out, data))
            self._torch_row(f"folded: {policy}", folded[policy], held_out)
        self._generate(model, folded, tokenizer)
        example = {"input_ids": held_out[:2], "attention_mask": torch.ones_like(held_out[:2])}
        self._onnx("ONNX folded (float)", folded["float"], example, held_out)
        self._onnx("ONNX unfolded (NF4)", lambda: model, example, held_out)
        self._time(held_out[:1])

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
        with self._timed(title), self.bar(title, self.size.steps) as advance:
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

    def _fold(self, model: nn.Module, policy: str, base: nn.Module, held_out: Tensor, data: Tensor) -> nn.Module:
        """A folded model; of a stage that was done before only the model is made again."""
        done, calibrates = self.results.setdefault("folds", {}), policy in ("calibrate", TRAINED)
        name = policy.replace(", ", "_").replace(" ", "_")
        file = self.folder / f"{name}.safetensors"
        if policy in done and calibrates and file.exists():
            return smollm.load_nf4(base, file)
        # Others only measure on these inputs; calibration learns from them, so it must not see what is held out.
        chosen = data[: self.size.calibration].split(BATCH) if calibrates else [held_out[:2]]
        inputs = [{"input_ids": i, "attention_mask": torch.ones_like(i), "use_cache": False} for i in chosen]
        if policy == TRAINED:
            result = self._train_through(model, inputs, data)
        else:
            with self._timed(f"fold: {policy}"), self.bar(f"fold: {policy}", 210) as advance:
                result = oftfx.fold(
                    model,
                    quantized=policy,
                    calibration=inputs if calibrates or policy not in done else None,
                    progress=lambda count, _: advance(count, ""),
                )
        if policy == "calibrate":
            self._calibrated = result
        if policy in done:
            return result.model
        self.say(str(result.report))
        write_whole(self.folder / f"fold_{name}.json", result.report.to_json().encode())
        if calibrates:
            smollm.save_nf4(result.model, file)
        done[policy] = {"survival": result.report.survival, "output_error": result.report.output_error}
        self._write()
        return result.model

    def _train_through(self, model: nn.Module, inputs: list[dict[str, Any]], data: Tensor) -> oftfx.FoldResult:
        """Fold with scales that have trained on; the rotations are what they were afterwards."""
        title = f"fold: {TRAINED}"
        with (
            self._timed(title),
            self.bar(title, self.size.aware_steps) as advance,
            oftfx.fold_aware(model, "calibrate", calibration=self._calibrated or inputs),
        ):
            train(
                model,
                data,
                steps=self.size.aware_steps,
                first=self.size.steps,
                size=BATCH,
                rate=RATE,
                folder=self.folder / "scales",
                report=lambda step, loss: advance(step, f"loss {loss:.3f}"),
            )
            result = oftfx.fold(model, calibration=inputs)
        self._calibrated = None
        return result

    def _generate(self, model: nn.Module, folded: dict[str, Callable[[], nn.Module]], tokenizer: Any) -> None:
        if "same_tokens" in self.results:
            return
        prompt = tokenizer("The Australian government announced", return_tensors="pt")
        with self._timed("generate 24 tokens, unfolded and folded"):
            first = _greedy(model, prompt)
            same = {policy: torch.equal(_greedy(folded[policy](), prompt), first) for policy in ("keep", "float")}
        self.say("  " + tokenizer.decode(first[0], skip_special_tokens=True).replace("\n", " "))
        self.results["same_tokens"] = same
        self._write()

    def _onnx(self, name: str, model: Callable[[], nn.Module], example: dict[str, Tensor], held_out: Tensor) -> None:
        path = self.folder / (name.split()[1] + ".onnx")
        session = cache(lambda: ppl.in_onnxruntime(path))
        done = self.results.setdefault("exports", {})
        if name not in done or not path.exists():
            source = model()
            with self._timed(f"export {path.name} and verify it"):
                report = oftfx.export_onnx(source, path, example)
                other = held_out[:3, :77]  # another batch and length than the example's
                want, got = ppl.in_torch(source)(other), session()(other)
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
        self._row(name, "ONNX Runtime", lambda: done[name]["mib"], session, held_out)

    def _time(self, ids: Tensor) -> None:
        """A forward of every row, all in turn; a model that is not there any more is made again first."""
        functions = {name: partial(logits(), ids) for name, logits in self._logits.items()}
        title, calls = "time all models in turn", len(functions) * (self.size.rounds + 1)
        with self._timed(title), self.bar(title, calls) as advance:
            self.results["time_ratios"] = ratios(
                functions, REFERENCE, rounds=self.size.rounds, report=lambda done: advance(done, "")
            )
        self.results["time_threads"] = torch.get_num_threads()
        self._write()

    # -- bookkeeping ----------------------------------------------------------------------------

    def _torch_row(self, name: str, model: Callable[[], nn.Module], held_out: Tensor) -> None:
        self._row(name, "torch", lambda: stored_bytes(model()) / 2**20, cache(lambda: ppl.in_torch(model())), held_out)

    def _row(
        self,
        name: str,
        runs_in: str,
        mib: Callable[[], float],
        logits: Callable[[], ppl.Logits],
        held_out: Tensor,
    ) -> None:
        """One row of the table; a row that is there needs no model until all are timed."""
        self._logits[name] = logits
        rows = self.results.setdefault("rows", {})
        if name not in rows:
            function = logits()
            with self._timed(f"perplexity: {name}"):
                perplexity = ppl.perplexity(function, held_out)
            rows[name] = {"runs_in": runs_in, "mib": mib(), "perplexity": perplexity}
            self._write()
        self.say(f"  {name}: perplexity {rows[name]['perplexity']:.2f}")

    @contextmanager
    def _timed(self, title: str) -> Iterator[None]:
        """Add to the seconds of a stage, which may be several starts', and also of a start that is interrupted."""
        start, seconds = time.perf_counter(), self.results.setdefault("stage_seconds", {})
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            seconds[title] = seconds.get(title, 0.0) + passed
            self._write()
        self.say(f"{title} ({passed:.1f} s)")

    def _read(self) -> None:
        asked = {"steps": self.size.steps, "held_out": self.size.held_out}
        self.results.update(figures.read(self.folder, asked, self.say))

    def _write(self) -> None:
        figures.write(self.folder, self.results)

    def table(self) -> str:
        """The final table as text."""
        return render("SmolLM2-135M, held-out news text", COLUMNS, table_rows(self.results))


def _greedy(model: nn.Module, prompt: Any) -> Tensor:
    with torch.no_grad():
        return model.eval().generate(**prompt, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
