"""What each fold policy keeps of an adapter, on real models in real 4-bit formats; PEFT's own merge beside it.

    tools/environment-layers
    PYTHONPATH=. .venv-layers/bin/python tools/bench/bench_fold_quality.py [--only NF4] [--quick]

An OFT adapter is trained on every base (with --floats also one on the float model), then folded by every policy. The
base itself, calibrated on the same data, tells what is not the adapter's doing. Trained adapters and finished rows are
kept in the folder, so an interrupted run goes on. Writes tools/results/fold_quality.json, from which
tools/docs/update_tables.py makes the documentation's tables. A full run takes one to two hours on two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import oftfx
from tools.bench.fold_models import FORMATS, Encoder, Language, Task, merged_by_peft
from tools.bench.fold_updates import measure as measure_updates

SAME_BASE = (
    "keep",
    "float",
    "requantize",
    "PEFT",
    "calibrate",
    "base calibrated",
    "fold-aware",
    "fold-aware, unfolded",
)
AWARE_STEPS = 40
RESULTS = Path(__file__).parents[1] / "results" / "fold_quality.json"


class Bench:
    """All rows of one run, written after each.

    Args:
        folder: adapters and results.
        floats: also an adapter that is trained on the float model.
    """

    def __init__(self, folder: Path, floats: bool = False) -> None:
        self.folder, self.path, self.floats = folder, folder / "results.json", floats
        self.rows: list[dict[str, Any]] = []
        self.updates: list[dict[str, Any]] = []
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            self.rows, self.updates = stored["rows"], stored["updates"]

    def write(self) -> None:
        """Keep what is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"threads": torch.get_num_threads(), "rows": self.rows, "updates": self.updates}, indent=1)
        self.path.write_text(text + "\n")

    def run(self, task: Task, name: str) -> None:
        """Every row of one model on one base."""
        on_floats = (None, ("requantize", "reference", "reference, calibrated"))
        for trained, policies in ((name, SAME_BASE), *([on_floats] if self.floats else [])):
            todo = [p for p in policies if not self._has(task, name, trained, p)]
            if not todo:
                continue
            model = task.adapted(name, self.folder, say, trained=trained)
            with oftfx.disable_adapters(model):
                base = task.outputs(model)
            unfolded = task.outputs(model)
            adapted = task.goal(unfolded, partial(self._trained, task, trained))
            for policy, outputs in (("none", base), ("unfolded", unfolded)):
                if not self._has(task, name, trained, policy):
                    self._add(task, name, trained, policy, base, adapted, outputs, {})
            for policy in todo:
                start = time.perf_counter()
                try:
                    folded, more = self._fold(task, name, trained, policy, model)
                except Exception as error:  # what PEFT raises is the finding
                    if policy != "PEFT":
                        raise
                    more = {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
                    self._add(task, name, trained, policy, base, adapted, None, more)
                    continue
                more["seconds"] = time.perf_counter() - start
                self._add(task, name, trained, policy, base, adapted, task.outputs(folded), more)
                del folded
                gc.collect()

    def _trained(self, task: Task, trained: str | None) -> Any:
        return task.outputs(task.adapted(trained, self.folder, say, trained=trained))

    def _calibrated_base(self, task: Task, name: str) -> nn.Module:
        """The base itself, calibrated on the same data: what of a row is not the adapter's doing."""
        model = oftfx.transform(task.quantized(name), {"all-linear": oftfx.OFT(32)})
        with torch.no_grad():  # exactly the identity would be left untouched
            for parameter in oftfx.adapter_parameters(model):
                parameter.fill_(1e-7)
        return oftfx.fold(model, quantized="calibrate", calibration=task.calibration).model.eval()

    def _through_the_fold(self, task: Task, model: nn.Module, unfolded: bool) -> nn.Module:
        """The adapter, some steps more with scales that train, folded as trained; or used unfolded afterwards."""
        oftfx.set_adapter(model, "default", trainable=True)
        if not unfolded:
            oftfx.fold_aware(model, "calibrate", calibration=task.calibration)
            optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=task.rate, weight_decay=0.0)
            model.train()
            for step in range(AWARE_STEPS):
                for group in optimizer.param_groups:
                    group["lr"] = task.rate * min((step + 1) / 3, (AWARE_STEPS - step) / (AWARE_STEPS - 3))
                task.loss(model, task.steps + step).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            model.eval()
            return oftfx.fold(model).model
        oftfx.fold_aware(model, None)
        return model

    def _fold(
        self, task: Task, name: str, trained: str | None, policy: str, model: nn.Module
    ) -> tuple[nn.Module, dict[str, Any]]:
        if policy == "PEFT":
            where = self.folder / task.name / (trained or "float").replace(" ", "-") / "adapter"
            return merged_by_peft(task, name, where), {}
        if policy == "base calibrated":
            return self._calibrated_base(task, name), {}
        if policy.startswith("fold-aware"):
            return self._through_the_fold(task, model, policy.endswith("unfolded")), {"steps": AWARE_STEPS}
        calibration = task.calibration if policy.endswith(("calibrate", "calibrated")) else None
        reference = task.base if policy.startswith("reference") else None
        result = oftfx.fold(model, quantized=policy.split(",")[0], calibration=calibration, reference=reference)
        report = result.report
        return result.model.eval(), {
            "survival": report.survival,
            "bytes_before": sum(s.bytes_before for s in report),
            "bytes_after": sum(s.bytes_after for s in report),
        }

    def _has(self, task: Task, name: str, trained: str | None, policy: str) -> bool:
        key = (task.name, name, trained or "float", policy)
        return any((r["model"], r["base"], r["trained_on"], r["policy"]) == key for r in self.rows)

    def _add(
        self, task: Task, name: str, trained: str | None, policy: str, base: Any, adapted: Any, outputs: Any, more: Any
    ) -> None:
        row = {"model": task.name, "metric": task.metric, "base": name, "trained_on": trained or "float"}
        row |= {"policy": policy, **more}
        if outputs is not None:
            row |= task.compare(base, adapted, outputs)
        self.rows.append(row)
        self.write()
        say(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()))


def say(line: str) -> None:
    """To the terminal at once."""
    print(line, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FORMATS, action="append", help="only this base; may be repeated")
    parser.add_argument("--model", choices=("smollm2", "minilm"), action="append", help="only this model")
    parser.add_argument("--floats", action="store_true", help="also an adapter that is trained on the float model")
    parser.add_argument("--quick", action="store_true", help="two training steps: to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("oftfx-bench/fold-quality"), help="adapters and results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the packages' own
    bench = Bench(args.folder / ("quick" if args.quick else "full"), args.floats)
    tasks: dict[str, Callable[[], Task]] = {"minilm": Encoder, "smollm2": Language}
    for key in args.model or tasks:
        task = tasks[key]()
        if args.quick:
            task.steps, task.calibration = 2, task.calibration[:2]
        for name in args.only or FORMATS:
            bench.run(task, name)
        if isinstance(task, Encoder) and not bench.updates:
            bench.updates = measure_updates(task, say)
            bench.write()
    if not args.quick:
        RESULTS.write_text(bench.path.read_text())
        say(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main()
