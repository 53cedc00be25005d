"""Check every architecture of tests/zoo and write the figures: .venv/bin/python -m tools.bench.zoo_table [NAME ...]

One row an architecture goes to tools/results/zoo.json, which tools/docs/update_tables.py turns into a table. With
names, only those are run and shown, and nothing is written.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
import warnings
from pathlib import Path

import torch

from oftfx.errors import OftfxError
from tests.zoo.architectures import ARCHITECTURES, Architecture
from tests.zoo.checks import Subject

OUT = Path(__file__).parents[1] / "results/zoo.json"


def row(arch: Architecture) -> dict:
    """The figures of one architecture; ``error`` instead where it cannot be rotated at all."""
    start = time.perf_counter()
    subject = Subject(arch)
    figures: dict = {"family": arch.family, "class": type(subject.base).__name__, "layers_run": len(subject.executed)}
    try:
        plan, found = subject.plan, subject.gradients()
        same, other = subject.fold_errors()
        figures |= {
            "sites_rotated": len(plan),
            "kinds": sorted({e.site.kind for e in plan}),
            "skipped": {s.fqn: s.reason for s in plan.skipped},
            "unaccounted": subject.unaccounted(),
            "bytes_percent": round(100 * subject.coverage(), 1),
            "rung": plan.trace.rung,
            "rung_reason": plan.trace.reason,
            "identity": subject.identity(),
            "gradients_rel": max(found.errors.values()),
            "gradients_dtype": "float64" if arch.wide else "float32",
            "fold_rel": same,
            "other_size_rel": other,
            "effect": round(subject.effect(), 3),
            "base_untouched": subject.base_is_untouched(),
        }
    except OftfxError as error:
        figures["error"] = str(error)
    return {**figures, "seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = sys.argv[1:] or list(ARCHITECTURES)
    rows = {}
    for name in names:
        rows[name] = row(ARCHITECTURES[name])
        print(name, json.dumps(rows[name]), flush=True)
    if names == list(ARCHITECTURES):
        versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "diffusers")}
        OUT.write_text(json.dumps({"versions": versions, "architectures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
