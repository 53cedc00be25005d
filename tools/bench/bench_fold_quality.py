"""What each fold policy keeps of an adapter, on real models in real quantized formats; what people do today beside it.

    tools/environment-layers
    PYTHONPATH=. .venv-layers/bin/python tools/bench/bench_fold_quality.py --model smollm2 [--only NF4] [--seed 1]
    PYTHONPATH=. .venv/bin/python tools/bench/bench_fold_quality.py --model ocr

An OFT adapter is trained on every base (with --floats also one on the float model) at the learning rate that is best
unfolded, then folded by every policy. The base itself, calibrated on the same data, tells what is not the adapter's
doing. Trained adapters and finished rows are kept in the folder, so an interrupted run goes on; a new folder begins
with the rows of the committed results. Writes tools/results/fold_quality.json, from which tools/docs/update_tables.py
makes the documentation's tables. A base of the language model takes about half an hour on one core.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import oftfx
from oftfx.files import write_whole
from tools.bench.fold_bases import CALIBRATED, FORMATS, INT8
from tools.bench.fold_models import Encoder, Language, Task
from tools.bench.fold_peers import merged_by_peft
from tools.bench.fold_scans import Recogniser
from tools.bench.fold_updates import measure as measure_updates

SIMPLE = ("keep", "float", "requantize")
THROUGH = ("calibrate", "fold-aware", "fold-aware, unfolded")
CONTROL = "unfolded, trained on"
"""As many plain steps more as the scales get: what of a fold-aware row is more training, and what the scales' doing."""
ON_FLOATS = ("requantize", "reference", "reference, calibrated")
GPTQ_BASES = ("GPTQ 4-bit", CALIBRATED)
DISTIL = 2
"""Passes over the calibration data in which scales learn the unfolded outputs, where no steps are made."""
RESULTS = Path(__file__).parents[1] / "results" / "fold_quality.json"
Row = dict[str, Any]


class Bench:
    """All rows of one run, written after each.

    Args:
        folder: adapters and results.
        floats: also an adapter that is trained on the float model.
    """

    def __init__(self, folder: Path, floats: bool = False) -> None:
        self.folder, self.path, self.floats = folder, folder / "results.json", floats
        self.rows, self.updates = _read(self.path)

    def add(self, rows: list[Row], updates: list[Row] | None = None) -> None:
        """Keep rows, beside those that another process may have written meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stored, self.updates = _read(self.path)
        self.updates = updates or self.updates
        self.rows = stored + rows
        write_whole(self.path, (json.dumps({"rows": self.rows, "updates": self.updates}, indent=1) + "\n").encode())
        for row in rows:
            say(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()))

    def run(self, task: Task, name: str) -> None:
        """Every row of one model on one base, with the seed of the task."""
        self._trained_on(task, name, name)
        if self.floats and task.seed == 0:
            self._trained_on(task, name, None)

    def _trained_on(self, task: Task, name: str, trained: str | None) -> None:
        key = {"model": task.name, "base": name, "trained_on": trained or "float", "seed": task.seed}
        done = {r["policy"] for r in self.rows if all(r.get(k) == v for k, v in key.items())}
        wanted = _policies(name, trained, task.seed)
        todo = [p for p in wanted if p not in done and (p != CONTROL or task.aware_steps)]
        if not todo:
            return
        task.swept(trained, self.folder, say)
        model = task.adapted(name, self.folder, say, trained=trained)
        key |= {"metric": task.metric, "rate": task.rate(trained, self.folder), "threads": torch.get_num_threads()}
        with oftfx.disable_adapters(model):
            base = task.outputs(model)
        adapted = task.outputs(model)
        judge = Judge(task, key, base, adapted)
        first = (("none", "unfolded"), *((p,) for p in SIMPLE), ("PEFT",), ("base calibrated",), (CONTROL,))
        for group in (*first, *_others(name)):
            wanted = [p for p in group if p in todo]
            if not wanted:
                continue
            adapter = task.where(trained, self.folder, key["rate"]) / "adapter"
            self.add([row for row in self._rows(judge, name, group, model, adapter) if row["policy"] in wanted])
            gc.collect()

    def _rows(self, judge: Judge, name: str, group: tuple[str, ...], model: nn.Module, adapter: Path) -> Iterator[Row]:
        task, start, policy = judge.task, time.perf_counter(), group[0]
        if policy == "none":
            yield from (judge.row("none", judge.base, {}), judge.row("unfolded", judge.adapted, {}))
        elif policy == "calibrate":
            yield from _through_the_fold(judge, model)
        elif policy == CONTROL:
            yield judge.row(policy, _trained_on(judge, model), {"aware_steps": task.aware_steps})
        elif policy == "base calibrated":
            yield judge.of(policy, _calibrated_base(task, name), start)
        elif policy == "GPTQ after merging in float":
            yield judge.of(policy, task.after_merging(adapter), start)
        elif policy == "PEFT":
            try:
                yield judge.of(policy, merged_by_peft(task.quantized(name), adapter), start)
            except Exception as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                yield judge.row(policy, None, {"refused": why})
        else:
            calibration = task.calibration if policy.endswith("calibrated") else None
            reference = task.base if policy.startswith("reference") else None
            result = oftfx.fold(model, quantized=policy.split(",")[0], calibration=calibration, reference=reference)
            yield judge.of(policy, result.model.eval(), start, result.report)


class Judge:
    """Makes rows of one adapter.

    Args:
        task: data and metric.
        key: what all rows of it say.
        base: outputs without the adapter.
        adapted: outputs of it unfolded.
    """

    def __init__(self, task: Task, key: Row, base: Any, adapted: Any) -> None:
        self.task, self.key, self.base, self.adapted = task, key, base, adapted

    def of(self, policy: str, model: nn.Module, start: float, report: Any = None, **more: Any) -> Row:
        """A row of a folded model that took the time since ``start``."""
        more["seconds"] = time.perf_counter() - start
        if report is not None:
            more["survival"] = report.survival
            more |= {f"bytes_{when}": sum(getattr(s, f"bytes_{when}") for s in report) for when in ("before", "after")}
        start = time.perf_counter()
        outputs = self.task.outputs(model)
        more[f"{self.task.unit}_per_second"] = self.task.amount / (time.perf_counter() - start)
        return self.row(policy, outputs, more)

    def row(self, policy: str, outputs: Any, more: Row) -> Row:
        """A row of outputs; None where there are none."""
        found = {} if outputs is None else self.task.compare(self.base, self.adapted, outputs)
        return {**self.key, "policy": policy, **more, **found}


def _read(path: Path) -> tuple[list[Row], list[Row]]:
    stored = json.loads(path.read_text()) if path.exists() else {"rows": [], "updates": []}
    return stored["rows"], stored["updates"]


def _policies(name: str, trained: str | None, seed: int) -> tuple[str, ...]:
    if trained is None:
        return ("none", "unfolded", *ON_FLOATS)
    if seed:
        return ("none", "unfolded", "requantize", CONTROL, *THROUGH)
    if name == INT8:  # PEFT turns convolutions in another way
        return ("none", "unfolded", *SIMPLE, *THROUGH, "base calibrated")
    others = ("GPTQ after merging in float",) if name in GPTQ_BASES else ()
    return ("none", "unfolded", *SIMPLE, "PEFT", CONTROL, *THROUGH, "base calibrated", *others)


def _others(name: str) -> Iterator[tuple[str, ...]]:
    yield from ((p,) for p in ON_FLOATS[1:])
    if name in GPTQ_BASES:
        yield ("GPTQ after merging in float",)
    yield THROUGH  # the last: scales train under the adapter


def _calibrated_base(task: Task, name: str) -> nn.Module:
    """The base itself, calibrated on the same data: what of a row is not the adapter's doing."""
    model = oftfx.transform(task.quantized(name), task.rules)
    with torch.no_grad():  # exactly the identity would be left untouched
        for parameter in oftfx.adapter_parameters(model):
            parameter.fill_(1e-7)
    return oftfx.fold(model, quantized="calibrate", calibration=task.calibration).model.eval()


def _through_the_fold(judge: Judge, model: nn.Module) -> Iterator[Row]:
    """The adapter calibrated, then with scales that have trained, then used unfolded afterwards.

    A fold-aware model folds to what ``quantized="calibrate"`` gives until a step is made (there is a test).
    """
    task, start = judge.task, time.perf_counter()
    oftfx.set_adapter(model, "default", trainable=True)
    oftfx.fold_aware(model, "calibrate", calibration=task.calibration)
    result = oftfx.fold(model)
    yield judge.of("calibrate", result.model.eval(), start, result.report)
    del result
    if task.aware_steps:
        _more_steps(judge, model)
        folded = oftfx.fold(model.eval())
    else:
        start = time.perf_counter()
        oftfx.fold_aware(model, "calibrate", calibration=task.calibration, distil=DISTIL)
        folded = oftfx.fold(model)
    yield judge.of("fold-aware", folded.model.eval(), start, folded.report, aware_steps=task.aware_steps)
    del folded
    oftfx.fold_aware(model, None)
    yield judge.row("fold-aware, unfolded", task.outputs(model.eval()), {})


def _more_steps(judge: Judge, model: nn.Module) -> None:
    """At the same rate, on what the first steps have not read."""
    task, rate = judge.task, judge.key["rate"]
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=rate, weight_decay=0.0)
    task.train_mode(model)
    for step in range(task.aware_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 3, (task.aware_steps - step) / (task.aware_steps - 3))
        task.loss(model, task.steps + step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


def _trained_on(judge: Judge, model: nn.Module) -> Any:
    """Outputs of the adapter after the same steps without any fold; it is as it was afterwards."""
    oftfx.set_adapter(model, "default", trainable=True)
    parameters = list(oftfx.adapter_parameters(model))
    before = [p.detach().clone() for p in parameters]
    _more_steps(judge, model)
    outputs = judge.task.outputs(model)
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    return outputs


def _place(row: Row) -> tuple[int, ...]:
    models = [task.name for task in (Language, Encoder, Recogniser)]
    return models.index(row["model"]), (*FORMATS, INT8).index(row["base"]), row["seed"]


def _sweeps(folder: Path) -> Iterator[Row]:
    """What learning rates were chosen by."""
    for task, by in ((Language, "log-likelihood"), (Encoder, "contrastive loss"), (Recogniser, "CTC loss")):
        for path in sorted((folder / task.name).glob("*/sweep.json")):
            found = json.loads(path.read_text())
            rates = {k: v for k, v in found.items() if k != "base"}
            yield {"model": task.name, "base": path.parent.name, "by": by, "none": found["base"], "rates": rates}


def _take_up(folder: Path) -> None:
    """Let a new folder go on from the results that are committed: their rows and rates stand; adapters are trained."""
    if (folder / "results.json").exists() or not RESULTS.exists():
        return
    found = json.loads(RESULTS.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"rows": found["rows"], "updates": found["updates"]}
    for sweep in found["sweeps"]:
        path = folder / sweep["model"] / sweep["base"] / "sweep.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"base": sweep["none"], **sweep["rates"]}).encode())
    write_whole(folder / "results.json", (json.dumps(kept, indent=1) + "\n").encode())


def say(line: str) -> None:
    """To the terminal at once."""
    print(line, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*FORMATS, INT8), action="append", help="only this base; may be repeated")
    parser.add_argument("--model", choices=("smollm2", "minilm", "ocr"), action="append", help="only this model")
    parser.add_argument("--seed", type=int, action="append", help="order of the data; 0, 1 and 2 unless given")
    parser.add_argument("--floats", action="store_true", help="also an adapter that is trained on the float model")
    parser.add_argument("--quick", action="store_true", help="two training steps: to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("oftfx-bench/fold-quality"), help="adapters and results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the packages' own
    folder = args.folder / ("quick" if args.quick else "full")
    if not args.quick:
        _take_up(folder)
    bench = Bench(folder, args.floats)
    tasks: dict[str, Callable[[int], Task]] = {"minilm": Encoder, "smollm2": Language, "ocr": Recogniser}
    for key in args.model or tasks:
        for seed in args.seed or (0, 1, 2):
            task = tasks[key](seed)
            if args.quick:
                task.steps, task.aware_steps, task.calibration = 2, task.aware_steps and 4, task.calibration[:2]
                task.other, task.rates = task.other[:2], task.rates[:2]
            bases = (INT8,) if isinstance(task, Recogniser) else FORMATS
            for name in (b for b in bases if b in (args.only or bases)):
                bench.run(task, name)
            if isinstance(task, Encoder) and seed == 0 and not bench.updates:
                bench.add([], measure_updates(task, say))
    if not args.quick:
        rows = sorted(_read(bench.path)[0], key=_place)  # processes that ran side by side have mixed them
        found = {"sweeps": list(_sweeps(bench.folder)), "rows": rows, "updates": bench.updates}
        write_whole(RESULTS, (json.dumps(found, indent=1) + "\n").encode())
        say(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main()
