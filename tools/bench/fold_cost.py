"""Seconds and memory that a calibrated fold of SmolLM2-135M takes, in a process of its own.

    PYTHONPATH=. .venv-layers/bin/python tools/bench/fold_cost.py ADAPTER_DIRECTORY

Prints one line of JSON. Memory is the process's largest resident size during the fold less that before it, of which the
folded weights themselves are a part.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn as nn

import oftfx
from tools.bench.fold_models import Language


def resident(what: str) -> int:
    """``VmRSS``, the resident bytes now, or ``VmHWM``, the most since the last reset."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def size(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def main(adapter: Path) -> None:
    """Measure one fold."""
    warnings.simplefilter("ignore")
    task = Language()
    whole = size(task.base)
    model = oftfx.transform(task.quantized("NF4"), {"all-linear": oftfx.OFT(32)}, adapter="identity")
    oftfx.load_adapter(model, adapter, adapter="default")
    oftfx.set_adapter(model, "default")
    del task.base
    gc.collect()
    with torch.no_grad():
        model.eval()(**task.calibration[0])  # what a first forward allocates for good is not the fold's
    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten
    before, start = resident("VmRSS"), time.perf_counter()
    result = oftfx.fold(model, quantized="calibrate", calibration=task.calibration)
    seconds = time.perf_counter() - start
    assert result.report.measured is not None
    figures = {
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "tokens": sum(b["input_ids"].numel() for b in task.calibration),
        "extra_bytes": resident("VmHWM") - before,
        "float_model_bytes": whole,
        "quantized_model_bytes": size(model),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
