"""What a fold-aware training step costs: time as a ratio to a plain one, and the process's largest memory.

    PYTHONPATH=. .venv/bin/python tools/bench/bench_fold_aware.py ADAPTER [--rounds 5]

SmolLM2-135M in NF4, 4x128 tokens. Times are those of one process, steps of all kinds in turn; memory is that of a
process for each kind. ADAPTER is the quickstart's (oftfx-demo/adapter). Writes tools/results/fold_aware.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

import oftfx
from oftfx.demo import smollm, text
from oftfx.folding.aware import make_all_aware, quantized_sites, scales

RESULTS = Path(__file__).parents[1] / "results" / "fold_aware.json"
KINDS = ("plain", "requantize", "calibrate")
LENGTH, BATCH = 128, 4


def model_of(kind: str, adapter: Path) -> nn.Module:
    """Ready to train; with the base's own codes, for which they are does not matter here."""
    base, _ = smollm.load()
    model = oftfx.transform(smollm.hold_still(smollm.quantize_nf4(base)), {"all-linear": oftfx.OFT(32)})
    oftfx.load_adapter(model, adapter, trainable=True)
    oftfx.set_adapter(model, "default", trainable=True)
    if kind == "requantize":
        oftfx.fold_aware(model, "requantize")
    elif kind == "calibrate":
        sites = quantized_sites(model, ("default",))
        codes = {fqn: placement.weight_format().codes(placement.module) for fqn, placement, _ in sites}  # type: ignore[union-attr]
        make_all_aware(sites, scales(codes))
        oftfx.set_adapter(model, "default", trainable=True)
    return model.train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Seconds."""
    start = time.perf_counter()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def peak(kind: str, adapter: Path) -> float:
    """MiB of a process that makes two steps, beyond what it took to have the model."""
    done = subprocess.run(
        [sys.executable, __file__, str(adapter), "--peak", kind], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    data = text.blocks(smollm.load()[1], text.read("train"), LENGTH)
    if args.peak:
        model = model_of(args.peak, args.adapter)
        optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=1e-5)
        for index in range(2):
            step(model, optimizer, data[index * BATCH : (index + 1) * BATCH])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    memory = {kind: peak(kind, args.adapter) for kind in KINDS}
    print(memory, flush=True)
    models = {kind: model_of(kind, args.adapter) for kind in KINDS}
    optimizers = {k: torch.optim.AdamW(oftfx.adapter_parameters(m), lr=1e-5) for k, m in models.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for index in range(args.rounds + 1):
        ids = data[index * BATCH : (index + 1) * BATCH]
        for kind, model in models.items():
            passed = step(model, optimizers[kind], ids)
            if index:
                seconds[kind].append(passed)
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    found = {
        kind: {
            "step": medians[kind] / medians["plain"],
            "memory": memory[kind] / memory["plain"],
            "peak MiB": memory[kind],
        }
        for kind in KINDS
    }
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
