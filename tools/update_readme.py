"""Write the tables of the README from the figures in tools/results: .venv/bin/python tools/update_readme.py"""

import json
import re
from pathlib import Path

from oftfx.demo import ocr_job
from oftfx.demo.job import COLUMNS, table_rows

ROOT = Path(__file__).parents[1]


def markdown(columns, rows):
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows)])


def quickstart():
    return markdown(COLUMNS, table_rows(json.loads((ROOT / "tools/results/quickstart.json").read_text())))


def speed():
    seconds = json.loads((ROOT / "tools/results/speed.json").read_text())["seconds"]
    names = ["base", "PEFT OFT", "PEFT LoRA r=16", "oftfx", "oftfx, share_input", "oftfx, folded"]
    rows = []
    for what, figures in seconds.items():
        reference = "base" if "base" in figures else "PEFT OFT"
        cells = [f"{figures[n] / figures[reference]:.2f}" if n in figures else "" for n in names]
        rows.append((f"{what}, ratio to {reference}", *cells))
    return markdown(("", *names), rows)


def ocr():
    results = json.loads((ROOT / "tools/results/ocr.json").read_text())
    return markdown(ocr_job.COLUMNS, ocr_job.table_rows(results))


def zoo():
    names = ["model", "family", "layers run", "sites rotated", "kinds", "weight bytes rotated %", "program"]
    columns = [*names, "exact at start", "gradients", "fold", "fold, other size"]
    rows = []
    for name, figures in json.loads((ROOT / "tools/results/zoo.json").read_text())["architectures"].items():
        cells = [name, figures["family"], str(figures["layers_run"])]
        if "error" in figures:
            rows.append((*cells, "0", *[""] * (len(columns) - 4)))
            continue
        rows.append(
            (
                *cells,
                str(figures["sites_rotated"]),
                ", ".join(figures["kinds"]),
                f"{figures['bytes_percent']:.0f}",
                figures["rung"],
                "yes" if figures["identity"] else "no",
                *(f"{figures[k]:.0e}" for k in ("gradients_rel", "fold_rel", "other_size_rel")),
            )
        )
    return markdown(columns, rows)


def against_peft():
    rows = json.loads((ROOT / "tools/results/compare_peft.json").read_text())["rows"]
    return markdown(("case", "PEFT", "oftfx"), [(r["case"], r["PEFT"], r["oftfx"]) for r in rows if r["brief"]])


POLICIES = ("requantize", "calibrate")
FOLDS = {
    "none": "base, no adapter",
    "unfolded": "adapter, unfolded",
    "PEFT": "PEFT's merge",
}


def fold_quality(model):
    """One row a policy, one column a base; adapters trained on that base, then those trained on floats."""
    results = json.loads((ROOT / "tools/results/fold_quality.json").read_text())
    rows = [r for r in results["rows"] if r["model"] == model]
    bases = list(dict.fromkeys(r["base"] for r in rows))
    table = []
    for floats in (False, True):
        chosen = [r for r in rows if (r["trained_on"] == "float") == floats]
        for policy in dict.fromkeys(r["policy"] for r in chosen):
            found = {r["base"]: r for r in chosen if r["policy"] == policy}
            where = "float model" if floats else "same base"
            table.append((where, FOLDS.get(policy, policy), *(_quality(found.get(b), model) for b in bases)))
    return markdown(("adapter trained on", "fold", *bases), table)


def _quality(row, model):
    if row is None:
        return ""
    if "refused" in row:
        return "refuses"
    score = f"{row['score']:.2f}" if model.startswith("Smol") else f"{row['score']:.4f}"
    return score if row["policy"] == "none" else f"{score} ({100 * row['kept']:.1f} %)"


def updates():
    rows = json.loads((ROOT / "tools/results/fold_quality.json").read_text())["updates"]
    by = {(r["format"], r["policy"]): r for r in rows}
    table = []
    for name in dict.fromkeys(r["format"] for r in rows):
        plain, calibrated = by[name, "requantize"], by[name, "calibrate"]
        table.append(
            (
                name,
                *(f"{100 * r['survival']:.1f} %" for r in (plain, calibrated)),
                *(f"{100 * r['output_survival']:.1f} %" for r in (plain, calibrated)),
                *(f"{100 * r['output_error']:.2f} %" for r in (plain, calibrated)),
            )
        )
    heads = [f"{what}, {policy}" for what in ("survival", "in the output", "output error") for policy in POLICIES]
    return markdown(("format", *heads), table)


def serving():
    rows = json.loads((ROOT / "tools/results/serving.json").read_text())["rows"]
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    by = {(r["where"], r["clients"], r["variant"]): r for r in rows}
    table = []
    for where, clients in dict.fromkeys((r["where"], r["clients"]) for r in rows):
        found = [by[where, clients, v] for v in variants]
        cells = [f"{r['requests_per_second']:.1f}/s, {r['p50_ms']:.0f} / {r['p95_ms']:.0f} ms" for r in found]
        table.append((f"{where}, {clients} client{'s' if clients > 1 else ''}", *cells))
    return markdown(("", *variants), table)


def onnx():
    """A row a file; latencies as ratios to the folded one's."""
    results = json.loads((ROOT / "tools/results/onnx.json").read_text())
    lengths = list(results["latency"])
    table = []
    for name, row in results["rows"].items():
        ratios = [results["latency"][n].get(name) for n in lengths]
        error = f"{row['relative_error']:.0e}" if "relative_error" in row else ""
        size = f"{row['mib']:.0f}" if "mib" in row else ""
        table.append(
            (name, size, f"{row['perplexity']:.2f}", error, *(f"{r['ratio']:.2f}" if r else "" for r in ratios))
        )
    heads = [f"time, 1x{n}" for n in lengths]
    return markdown(("file", "MiB", "perplexity", "error", *heads), table)


def hot_swap():
    """What one session did with many adapters."""
    found = json.loads((ROOT / "tools/results/onnx.json").read_text())["hot_swap"]
    return (
        f"One session of the swappable file answered {found['requests']:,} requests of 1x16 tokens that chose one of "
        f"{found['adapters']} adapters at random:\neach answer within {found['worst_relative_error']:.1e} of its own "
        f"torch model (two adapters differ by {found['least_difference_of_two_adapters']:.2f} at least), "
        f"{found['ms']:.0f} ms a request\nagainst {found['ms_without_switching']:.0f} ms without switching, and the "
        f"process grew by {found['memory_growth_bytes'] / 2**20:.1f} MiB."
    )


def tables():
    return {
        "hot swap": hot_swap(),
        "quickstart": quickstart(),
        "fold smollm2": fold_quality("SmolLM2-135M"),
        "fold minilm": fold_quality("MiniLM-L6"),
        "fold updates": updates(),
        "speed": speed(),
        "onnx": onnx(),
        "serving": serving(),
        "ocr": ocr(),
        "zoo": zoo(),
        "peft": against_peft(),
    }


def filled(text):
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, t=table: m.group(1) + t + "\n" + m.group(2), text, flags=re.DOTALL)
        assert count == 1, name
    return text


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
