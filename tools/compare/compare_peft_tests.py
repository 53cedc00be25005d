"""PEFT's own test tables of OFT, through PEFT and through oftfx: which checks hold, and how many.

    .venv/bin/python tools/compare/compare_peft_tests.py [--peft-tests CHECKOUT] [--only TEXT] [--out FILE]

Without a checkout of PEFT the list of the same configurations in `peft_tables.py` is taken. A check that ends in an
exception does not hold; its class is in the JSON.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import peft
import torch

import oftfx
from oftfx.terminal import render

sys.path.insert(0, str(Path(__file__).parents[2]))  # the references are the tests' own
from tools.compare.peft_adapted import Ours, Theirs
from tools.compare.peft_checks import CHECKS
from tools.compare.peft_tables import ROWS, read

SIDES = (Theirs, Ours)


def outcome(side, row, check):
    """True, False, the class of an exception, or None where the check asks nothing of the row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            held = check(side, row)
            return held if held is None else bool(held)
        except Exception as error:
            return type(error).__name__


def run(rows, checks, note=lambda _: None):
    """Outcomes by row, check and side."""
    found = {}
    for number, row in enumerate(rows, 1):
        note(f"{number}/{len(rows)} {row.name}")
        found[row.name] = {
            name: {side.name: outcome(side, row, check) for side in SIDES} for name, check in checks.items()
        }
    return found


def counts(found):
    """By side, how many hold of how many."""
    every = [o for checks in found.values() for o in checks.values() if None not in o.values()]
    return {side.name: {"hold": sum(o[side.name] is True for o in every), "of": len(every)} for side in SIDES}


def table(found):
    """A row for each check: on how many configurations it holds, on both sides, and what happens otherwise."""
    rows = []
    for name in next(iter(found.values())):
        cells = []
        for side in SIDES:
            outcomes = [o for checks in found.values() if (o := checks[name][side.name]) is not None]
            failures = Counter("does not hold" if o is False else o for o in outcomes if o is not True)
            said = ", ".join(f"{count} {what}" for what, count in failures.items())
            cells.append(f"{sum(o is True for o in outcomes)} of {len(outcomes)}" + (f" ({said})" if said else ""))
        rows.append((name, *cells))
    return rows


def failures(found):
    """What does not hold: row, check and the outcome on each side that fails it."""
    return [
        {"row": row, "check": name, **{side: o for side, o in outcomes.items() if o is not True and o is not None}}
        for row, checks in found.items()
        for name, outcomes in checks.items()
        if not set(outcomes.values()) <= {True, None}
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft-tests", type=Path, help="a checkout of PEFT, whose tables are read")
    parser.add_argument("--only", default="", help="rows or checks whose name contains this")
    parser.add_argument("--out", type=Path, help="default: tools/results/peft_tests.json, if everything is run")
    options = parser.parse_args()
    rows = ROWS if options.peft_tests is None else read(options.peft_tests)
    chosen = [r for r in rows if options.only.lower() in r.name.lower()] or rows
    checks = {n: c for n, c in CHECKS.items() if options.only.lower() in n.lower()} or CHECKS
    found = run(chosen, checks, lambda text: print(text, file=sys.stderr))
    total = counts(found)
    title = f"PEFT {peft.__version__} and oftfx {oftfx.__version__}, torch {torch.__version__}, {len(chosen)} rows"
    print(render(title, ("check", *(side.name for side in SIDES)), table(found)))
    for side, count in total.items():
        print(f"{side}: {count['hold']} of {count['of']} checks hold")
    out = options.out or (None if options.only else Path(__file__).parents[1] / "results" / "peft_tests.json")
    if out is not None:
        versions = {"peft": peft.__version__, "torch": torch.__version__}
        source = "peft_tables.py" if options.peft_tests is None else "a checkout of PEFT"
        checks = {name: dict(zip((side.name for side in SIDES), cells, strict=True)) for name, *cells in table(found)}
        data = {"versions": versions, "tables": source, "counts": total, "checks": checks, "not": failures(found)}
        out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
