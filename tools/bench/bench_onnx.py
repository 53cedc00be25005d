"""SmolLM2-135M in ONNX Runtime, in every form: size, perplexity, latency; and one session for ten adapters.

    PYTHONPATH=. .venv/bin/python tools/bench/bench_onnx.py [--quick] [--folder oftfx-bench/onnx]

An adapter is trained on the float model and one on NF4 (or taken from the folder of bench_fold_quality.py). Files
and finished rows are kept, so an interrupted run goes on. Perplexity is measured in ONNX Runtime on 40 held-out blocks
of 128 tokens; the relative error is that of the logits against torch. Latencies come from one interleaved run at the
end, as ratios of medians to the folded graph. Writes tools/results/onnx.json. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn as nn
from torch import Tensor

import oftfx
from oftfx.evaluation import perplexity as ppl
from oftfx.files import write_whole
from tools.bench.fold_cost import resident
from tools.bench.fold_models import Language

RESULTS = Path(__file__).parents[1] / "results" / "onnx.json"
LENGTHS = {1: 60, 16: 30, 128: 12}
"""Tokens of a request, and how often it is timed."""
ADAPTERS, REQUESTS = 10, 1000


class Served:
    """A session; what each of its requests gets besides the tokens.

    Args:
        path: the file.
        adapter: an ``.onnx_adapter`` that acts in every request.
        more: further inputs, made for a batch.
    """

    def __init__(self, path: Path, adapter: Path | None = None, more: Callable[[int], dict[str, Any]] | None = None):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.more = more or (lambda _: {})
        self.adapters: dict[Path, Any] = {}
        self.use(adapter)

    def use(self, adapter: Path | None) -> None:
        """Another adapter from now on, or none."""
        self.options = onnxruntime.RunOptions()
        if adapter is not None:
            if adapter not in self.adapters:
                self.adapters[adapter] = onnxruntime.LoraAdapter()
                self.adapters[adapter].Load(str(adapter))
            self.options.add_active_adapter(self.adapters[adapter])

    def __call__(self, ids: Tensor) -> Tensor:
        feed = {"input_ids": ids.numpy(), "attention_mask": np.ones(tuple(ids.shape), np.int64), **self.more(len(ids))}
        return torch.from_numpy(self.session.run(["logits"], feed, self.options)[0]).float()


class Bench:
    """All figures of one run.

    Args:
        folder: files, adapters, figures.
        task: the model and its data.
    """

    def __init__(self, folder: Path, task: Language, adapters: Path) -> None:
        self.folder, self.task, self.trained = folder, task, adapters
        self.path = folder / "results.json"
        self.results: dict[str, Any] = {"threads": torch.get_num_threads(), "rows": {}}
        if self.path.exists():
            self.results = json.loads(self.path.read_text())
        folder.mkdir(parents=True, exist_ok=True)
        self.example = {"input_ids": task.held_out[:2, :9], "attention_mask": torch.ones(2, 9, dtype=torch.int64)}

    def write(self) -> None:
        """Keep what is there."""
        write_whole(self.path, (json.dumps(self.results, indent=1) + "\n").encode())

    def file(self, name: str, model: Callable[[], nn.Module], **options: Any) -> Path:
        """The exported file; made where it is not there. Its row gets its size and its error."""
        path = self.folder / f"{name.replace(' ', '-').replace(',', '')}.onnx"
        row = self.results["rows"].setdefault(name, {})
        if "relative_error" in row and path.exists():
            return path
        start = time.perf_counter()
        report = oftfx.export_onnx(model(), path, self.example, **options)
        row.update(
            mib=report.nbytes / 2**20,
            nodes=sum(report.operators.values()),
            relative_error=max(c.relative_error for c in report.checks),
            adapter_effect=max((c.adapter_effect or 0.0 for c in report.checks), default=0.0) or None,
            export_seconds=time.perf_counter() - start,
        )
        self.write()
        say(f"{name}: {report}")
        return path

    def score(self, name: str, served: Callable[[Tensor], Tensor]) -> None:
        """Perplexity of the held-out text."""
        row = self.results["rows"].setdefault(name, {})
        if "perplexity" not in row:
            row["perplexity"] = ppl.perplexity(served, self.task.held_out)
            self.write()
        say(f"{name}: perplexity {row['perplexity']:.2f}")

    def latencies(self, served: dict[str, Served]) -> None:
        """Medians of interleaved requests of one row, and their ratios to the folded graph's."""
        found = self.results["latency"] = {}
        for length, repeats in LENGTHS.items():
            ids = self.task.held_out[:1, :length].contiguous()
            times: dict[str, list[float]] = {n: [] for n in served}
            for _ in range(repeats + 1):  # the first is not counted
                for name, run in served.items():
                    start = time.perf_counter()
                    run(ids)
                    times[name].append(time.perf_counter() - start)
            medians = {n: 1000 * statistics.median(t[1:]) for n, t in times.items()}
            found[str(length)] = {n: {"ms": m, "ratio": m / medians["folded"]} for n, m in medians.items()}
            say(f"{length} tokens: " + ", ".join(f"{n} {f['ratio']:.3f}" for n, f in found[str(length)].items()))
        self.write()

    def hot_swap(self, model: nn.Module, path: Path, requests: int) -> None:
        """Ten adapters in one session, in turn; each answer against its own torch model, and the process's memory."""
        ids = self.task.held_out[:1, :16].contiguous()
        names, files, expected = [], [], []
        for index in range(ADAPTERS):
            name = f"tenant{index}"
            oftfx.add_adapter(model, name, {"all-linear": oftfx.OFT(32)}, trainable=False)
            torch.manual_seed(index)
            for rotation, base in zip(_rotations(model, name), _rotations(model, "default"), strict=True):
                rotation.skew.data.copy_(base.skew * (0.2 * index)).add_(torch.randn_like(base.skew), alpha=0.002)
            oftfx.set_adapter(model, name)
            names.append(name)
            files.append(oftfx.export_onnx_adapter(model, self.folder / f"{name}.onnx_adapter", adapter=name))
            expected.append(ppl.in_torch(model)(ids))
        apart = min(_rel(a, b) for i, a in enumerate(expected) for b in expected[:i])
        served = Served(path)
        for file in files:
            served.use(file)
            served(ids)
        before, worst, seconds = resident("VmRSS"), 0.0, []
        order = torch.randint(ADAPTERS, (requests,), generator=torch.Generator().manual_seed(0)).tolist()
        for index in order:
            start = time.perf_counter()
            served.use(files[index])
            got = served(ids)
            seconds.append(time.perf_counter() - start)
            worst = max(worst, _rel(got, expected[index]))
        alone = []
        for _ in range(min(100, requests)):
            start = time.perf_counter()
            served(ids)
            alone.append(time.perf_counter() - start)
        self.results["hot_swap"] = {
            "adapters": ADAPTERS,
            "requests": requests,
            "worst_relative_error": worst,
            "least_difference_of_two_adapters": apart,
            "memory_growth_bytes": resident("VmRSS") - before,
            "ms": 1000 * statistics.median(seconds),
            "ms_without_switching": 1000 * statistics.median(alone),
        }
        self.write()
        say(json.dumps(self.results["hot_swap"]))


def _rotations(model: nn.Module, name: str) -> list[Any]:
    return [m for n, m in model.named_modules() if n.endswith(f".oft.{name}")]


def _rel(got: Tensor, want: Tensor) -> float:
    return float(torch.linalg.vector_norm(got.double() - want.double()) / torch.linalg.vector_norm(want.double()))


def say(line: str) -> None:
    """To the terminal at once."""
    print(line, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two training steps, 20 requests: to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("oftfx-bench/onnx"), help="files and figures")
    parser.add_argument(
        "--adapters", type=Path, default=Path("oftfx-bench/fold-quality/full"), help="trained ones; made if not there"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    task = Language()
    if args.quick:
        task.steps, task.held_out = 2, task.held_out[:4]
    trained = args.folder / "quick-adapters" if args.quick else args.adapters
    bench = Bench(args.folder / ("quick" if args.quick else "full"), task, trained)
    floats = task.adapted(None, trained, say, trained=None)
    bench.score("float, in torch", ppl.in_torch(floats))
    files = {
        "folded": bench.file("folded", lambda: oftfx.fold(floats).model),
        "fixed": bench.file("fixed", lambda: floats),
        "swappable": bench.file("swappable", lambda: floats, adapters="swappable"),
        "mixed": bench.file("mixed", lambda: floats, adapters="mixed"),
    }
    adapter = oftfx.export_onnx_adapter(floats, bench.folder / "a.onnx_adapter", graph=files["swappable"])
    place = 1 + list(oftfx.adapters(floats)).index("default")  # 0 is the base
    served = {
        "folded": Served(files["folded"]),
        "fixed": Served(files["fixed"]),
        "swappable": Served(files["swappable"], adapter),
        "mixed": Served(files["mixed"], more=lambda rows: {"adapter_index": np.full(rows, place)}),
    }
    quantized = task.adapted("NF4", trained, say, trained="NF4")
    bench.score("NF4, in torch", ppl.in_torch(quantized))
    for name, make in {
        "NF4, unfolded": lambda: quantized,
        "NF4, folded": lambda: calibrated_fold(quantized, task),
        "NF4, unfolded, float16": lambda: quantized.half(),
    }.items():
        served[name] = Served(bench.file(name, make))
    for name, run in served.items():
        bench.score(name, run)
    bench.latencies(served)
    served.clear()
    bench.hot_swap(floats, files["swappable"], 20 if args.quick else REQUESTS)
    if not args.quick:
        RESULTS.write_text(bench.path.read_text())
        say(f"written to {RESULTS.name}")


def calibrated_fold(model: nn.Module, task: Language) -> nn.Module:
    """Folded into NF4, so nothing stays in front."""
    return oftfx.fold(model, quantized="calibrate", calibration=task.calibration).model


if __name__ == "__main__":
    main()
