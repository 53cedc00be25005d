"""Write the tables of the README and of the site's pages from the figures in tools/results.

.venv/bin/python tools/docs/update_tables.py. A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; a page may
show any of them, and each stands somewhere.
"""

import json
import re
import sys
from pathlib import Path

from oftfx.demo import ocr_job
from oftfx.demo.job import FOLDS as FOLDS_OF_JOB
from oftfx.demo.job import FULL, TRAINED
from oftfx.demo.job_table import COLUMNS, table_rows

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, it knows its own folder only

from tools.docs import fold_tables, server_tables  # noqa: E402
from tools.docs.table_text import markdown, unbroken  # noqa: E402

PAGES = (ROOT / "README.md", *sorted((ROOT / "tools/docs/pages").rglob("*.md")))
_TABLE = re.compile(r"(<!-- (?!end\b)([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _quickstart_results():
    return json.loads((ROOT / "tools/results/quickstart.json").read_text())


def quickstart():
    return markdown(COLUMNS, table_rows(_quickstart_results()))


FOLD_POLICIES = (
    (
        '`"keep"`',
        "keep",
        "stays bit for bit, a fixed rotation stays in front",
        "the default; where the last bit of quality counts",
    ),
    ('`"float"`', "float", "becomes a float weight", "before exporting or quantizing anew; larger"),
    ('`"requantize"`', "requantize", "takes the nearest codes", "no data, fast; loses small updates, and says so"),
    (
        '`"calibrate"`',
        "calibrate",
        "takes the codes that keep the layer's outputs on `calibration`",
        "nothing in front and no larger: the one to deploy",
    ),
    (
        '`"reference"`',
        "",
        "is made anew from the original float weights",
        "adapters trained on the **float** model only",
    ),
    ("`oftfx.Budget(...)`", "", "takes the first policy whose error is small enough", "layer by layer"),
    ("a function", "", "of the `Site`, to any of these", "rules of one's own"),
)
"""Value, key in the quickstart's figures, what it does, when."""


def _gains():
    """The share of the quickstart's gain that each fold keeps, as text."""
    rows = {r[0]: dict(zip(COLUMNS, r, strict=True)) for r in table_rows(_quickstart_results())}
    return {policy: rows[f"folded: {policy}"]["gain kept %"] for policy in FOLDS_OF_JOB}


def policies():
    """What a fold does with quantized weights, with what it kept in the quickstart."""
    gains, header = _gains(), ("`quantized=`", "the quantized weight", "gain kept", "use it")
    return markdown(header, [(p, what, f"{gains[k]} %" if k else "", use) for p, k, what, use in FOLD_POLICIES])


def headline():
    """The honest sentence."""
    gains = _gains()
    return unbroken(
        f"In the quickstart (SmolLM2-135M on NF4, a well trained adapter), rounding the rotated weights to the nearest "
        f"codes (`requantize`) keeps\n{gains['requantize']} % of the adapter's gain, rounding by calibration "
        f"(`calibrate`) {gains['calibrate']} %,\nand {FULL.aware_steps} steps more in which the scales of those codes "
        f"train (`fold_aware`) {gains[TRAINED]} %; `keep` and `float` keep {gains['keep']} %."
    )


def speed():
    seconds = json.loads((ROOT / "tools/results/speed.json").read_text())["seconds"]
    names = ["base", "PEFT OFT", "PEFT LoRA r=16", "oftfx", "oftfx, share_input", "oftfx, folded"]
    rows = []
    for what, figures in seconds.items():
        reference = "base" if "base" in figures else "PEFT OFT"
        cells = [f"{figures[n] / figures[reference]:.2f}" if n in figures else "" for n in names]
        rows.append((f"{what}, ratio to {reference}", *cells))
    return markdown(("", *names), rows)


def scaling():
    rows = json.loads((ROOT / "tools/results/scaling.json").read_text())["rows"]
    return markdown(("what", "ms", "beside", "ratio"), rows)


_FILES = {"dense": "bfloat16", "gptq-keep": "GPTQ, 4 bits, `keep`", "gptq-requantize": "GPTQ, 4 bits, `requantize`"}


def _checkpoint_cases():
    return json.loads((ROOT / "tools/results/checkpoint.json").read_text())["cases"]


def checkpoint():
    rows = []
    for case, found in _checkpoint_cases().items():
        size, seconds = f"{found['bytes'] / 1e9:.1f} GB", max(found["fold_seconds"])
        rate, before = f"{found['fold_mb_per_second']} MB/s", f"{found['check_seconds']:.0f} s"
        memory = f"{found['peak_mb_over_interpreter']} MB"
        rows.append((_FILES[case], size, f"{seconds:.0f} s", rate, f"{found['share_of_cp']:.2f}", before, memory))
    return markdown(("checkpoint", "size", "fold", "rate", "of `cp`'s rate", "before", "memory"), rows)


def checkpoint_costs():
    rows = []
    for billions in (8, 70, 700):
        row = [f"{billions} billion numbers"]
        for case, each in (("dense", 2), ("gptq-keep", 0.53)):
            size, found = billions * each, _checkpoint_cases()[case]
            rates = found["fold_mb_per_second"], found["cp_mb_per_second"]
            row += [f"{size:,.0f} GB", *(_duration(size * 1e3 / rate) for rate in rates)]
        rows.append(row)
    columns = ("model", "bfloat16", "fold", "a copy", "GPTQ, 4 bits, `keep`", "fold", "a copy")
    return markdown(columns, rows)


def streamed():
    """Calibrated folds, from files and of a model in memory."""
    found = json.loads((ROOT / "tools/results/streamed.json").read_text())
    names = {
        "memory": "`oftfx fold`, hidden states in memory",
        "disk": "`oftfx fold`, hidden states on the disk",
        "model": "`oftfx.fold`, model in memory",
    }
    rows = [
        (name, f"{found['rows'][place]['seconds']:.0f}", f"{found['rows'][place]['bytes'] / 1e6:.0f} MB")
        for place, name in names.items()
    ]
    return markdown(("calibrated fold", "s", "memory"), rows)


def _duration(seconds):
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"


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
    return unbroken(
        f"One session of the swappable file answered {found['requests']:,} requests of 1x16 tokens that chose one of "
        f"{found['adapters']} adapters at random:\neach answer within {found['worst_relative_error']:.1e} of its own "
        f"torch model (two adapters differ by {found['least_difference_of_two_adapters']:.2f} at least), "
        f"{found['ms']:.0f} ms a request\nagainst {found['ms_without_switching']:.0f} ms without switching, and the "
        f"process grew by {found['memory_growth_bytes'] / 2**20:.1f} MiB."
    )


def tables():
    return {
        "headline": headline(),
        "runtimes": markdown(*server_tables.runtimes()),
        "policies": policies(),
        "hot swap": hot_swap(),
        "quickstart": quickstart(),
        "fold smollm2": fold_tables.fold_quality("SmolLM2-135M"),
        "fold minilm": fold_tables.fold_quality("MiniLM-L6"),
        "fold ocr": fold_tables.fold_quality("english_g2"),
        "fold seconds": fold_tables.fold_seconds("SmolLM2-135M"),
        "fold rates": fold_tables.fold_rates(),
        "few tokens": fold_tables.few_tokens(),
        "retention": fold_tables.retention(),
        "aware step": fold_tables.aware_step(),
        "fold updates": fold_tables.updates(),
        "speed": speed(),
        "scaling": scaling(),
        "checkpoint": checkpoint(),
        "checkpoint costs": checkpoint_costs(),
        "streamed": streamed(),
        "onnx": onnx(),
        "serving": serving(),
        "vllm": markdown(*server_tables.in_vllm()),
        "vllm road": markdown(*server_tables.to_four_bits()),
        "ocr": ocr(),
        "zoo": zoo(),
        "peft": against_peft(),
    }


def filled(text, found):
    """The text of a page with today's tables."""
    return _TABLE.sub(lambda m: f"{m[1]}{found[m[2]]}\n{m[3]}", text)


def shown(text):
    """Names of the tables in a page."""
    return {m[2] for m in _TABLE.finditer(text)}


if __name__ == "__main__":
    found = tables()
    for page in PAGES:
        page.write_text(filled(page.read_text(), found))
