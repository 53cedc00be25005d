"""PEFT's OFT and oftfx in one process on the same weights, inputs and rotations, each against a float64 reference.

    .venv/bin/python tools/compare/compare_peft.py [--only TEXT] [--out FILE]

Every figure is a relative Frobenius error unless its name says otherwise; an exception is reported by its class.
"""

import argparse
import json
import sys
from pathlib import Path

import peft
import torch

import oftfx
from oftfx.terminal import render

sys.path.insert(0, str(Path(__file__).parents[2]))  # the references are the tests' own
from tools.compare.peft_cases import CASES


def cell(figures):
    """``identity 0, forward 1.2e-07``; an exception that is the same everywhere stands alone."""
    texts = {name: shown(value) for name, value in figures.items()}
    if len(set(texts.values())) == 1 and all(isinstance(v, str) for v in figures.values()):
        return next(iter(texts.values()))
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def shown(value):
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return value if isinstance(value, str) else f"{value:.2g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, help="default: tools/results/compare_peft.json, if all rows are run")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        if options.only.lower() in case.name.lower():
            figures = case.measure(case)
            cells = {name: cell(f) for name, f in figures.items()}
            rows.append({"case": case.name, **cells, "brief": case.brief, "figures": figures})
            print(f"{len(rows)} {case.name}", file=sys.stderr)
    title = f"PEFT {peft.__version__} and oftfx {oftfx.__version__}, torch {torch.__version__}, CPU"
    print(render(title, ("case", "PEFT", "oftfx"), [(r["case"], r["PEFT"], r["oftfx"]) for r in rows]))
    out = options.out or (None if options.only else Path(__file__).parents[1] / "results" / "compare_peft.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        versions = {"peft": peft.__version__, "torch": torch.__version__}
        out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
