"""The tables of folds and of strengths: heads and rows, from the figures in tools/results."""

import json
from pathlib import Path

from tools.docs.table_text import markdown, unbroken

RESULTS = Path(__file__).parents[1] / "results"
POLICIES = ("requantize", "calibrate")
FOLDS = {
    "none": "base, no adapter",
    "unfolded": "adapter, unfolded",
    "keep": "`keep`",
    "float": "`float`",
    "requantize": "`requantize`",
    "PEFT": "PEFT's merge",
    "GPTQ after merging in float": "merged in floats, then GPTQ",
    "calibrate": "`calibrate`",
    "fold-aware": "`calibrate`, then scales trained",
    "fold-aware, unfolded": "the same adapter, unfolded",
    "unfolded, trained on": "40 plain steps more, unfolded",
    "base calibrated": "base, no adapter, calibrated",
    "reference": "`reference`",
    "reference, calibrated": "`reference`, calibrated",
}
"""What policies are called, in the order of the rows."""


def _fold_rows(model):
    results = json.loads((RESULTS / "fold_quality.json").read_text())
    return [r for r in results["rows"] if r["model"] == model]


def fold_quality(model):
    """One row a policy, one column a base; adapters trained on that base, then those trained on floats."""
    rows = _fold_rows(model)
    bases = list(dict.fromkeys(r["base"] for r in rows))
    floats = any(r["trained_on"] == "float" for r in rows)
    table = []
    for on_floats in (False, True):
        chosen = [r for r in rows if (r["trained_on"] == "float") == on_floats]
        for policy, name in FOLDS.items():
            found = {b: [r for r in chosen if (r["base"], r["policy"]) == (b, policy)] for b in bases}
            if any(found.values()):
                where = ["float model" if on_floats else "same base"] if floats else []
                table.append((*where, name, *(_quality(found[b], model) for b in bases)))
    return markdown((*(["adapter trained on"] if floats else []), "fold", *bases), table)


def _quality(rows, model):
    """The score of the first seed; of all the mean share, and half the distance from the least to the greatest."""
    if not rows:
        return ""
    if "refused" in rows[0]:
        return "refuses"
    text = f"{rows[0]['score']:.2f}" if model.startswith("Smol") else f"{rows[0]['score']:.4f}"
    if rows[0]["policy"] == "none":
        return text
    kept = [100 * r["kept"] for r in rows]
    spread = f" ± {(max(kept) - min(kept)) / 2:.1f}" if len(kept) > 1 and max(kept) > min(kept) else ""
    return f"{text} ({sum(kept) / len(kept):.1f}{spread} %)"


def fold_seconds(model):
    """How long folds took, on one core beside other work."""
    rows = [r for r in _fold_rows(model) if "seconds" in r and r["trained_on"] != "float"]
    bases = list(dict.fromkeys(r["base"] for r in rows))
    table = []
    for policy, name in FOLDS.items():
        found = {b: [r["seconds"] for r in rows if (r["base"], r["policy"]) == (b, policy)] for b in bases}
        if any(found.values()):
            table.append((name, *(f"{min(s):.3g}" if (s := found[b]) else "" for b in bases)))
    return markdown(("seconds", *bases), table)


def fold_rates():
    """The sweep of learning rates."""
    rows = json.loads((RESULTS / "fold_quality.json").read_text())["sweeps"]
    return markdown(
        ("model", "base", "judged by", "no adapter", *("rate: unfolded",) * 3),
        [
            (r["model"], r["base"], r["by"], f"{r['none']:.4g}", *(f"{k}: {v:.4g}" for k, v in r["rates"].items()))
            for r in rows
        ],
    )


def aware_step():
    """What a step of training through the fold costs."""
    rows = json.loads((RESULTS / "fold_aware.json").read_text())["rows"]
    scales, anew = rows["calibrate"], rows["requantize"]
    return unbroken(
        f"A training step of SmolLM2 in NF4 (4x128 tokens, two cores) takes {scales['step']:.2f} of a plain one with "
        f"scales that train, and {anew['step']:.2f} where\nweights are rounded anew; the largest memory of the process "
        f"is {scales['memory']:.2f} and {anew['memory']:.2f} of the plain one's."
    )


def few_tokens():
    """A row a format: how far calibrating is below nearest rounding, by number of tokens."""
    rows = json.loads((RESULTS / "few_tokens.json").read_text())["summary"]
    tokens = list(dict.fromkeys(r["tokens"] for r in rows))
    by = {(r["format"], r["tokens"]): r for r in rows}
    table = []
    for name in dict.fromkeys(r["format"] for r in rows):
        found = [by[name, t] for t in tokens]
        cells = [f"{r['median']:.2f} / {r['largest to the better of nearest and old']:.2f}" for r in found]
        table.append((name, str(found[0]["layers"]), *cells))
    return markdown(("format", "layers", *(f"{t:,} tokens" for t in tokens)), table)


def updates():
    rows = json.loads((RESULTS / "fold_quality.json").read_text())["updates"]
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


def retention():
    """A row a strength: perplexity of what was learnt, and of what the base could do; LoRA at its best rate."""
    rows = json.loads((RESULTS / "retention.json").read_text())["rows"]
    tasks = [k for k in rows[0] if k not in ("adapter", "rate", "strength")]
    whole = {(r["adapter"], r["rate"]): r[tasks[0]] for r in rows if r["strength"] == 1}
    names = list(dict.fromkeys(a for a, _ in whole))
    best = {n: min((k for k in whole if k[0] == n), key=whole.get) for n in names}
    by = {(r["adapter"], r["rate"], r["strength"]): r for r in rows}
    strengths = list(dict.fromkeys(r["strength"] for r in rows))
    table = [(f"{s:g}", *(f"{by[*best[n], s][t]:.2f}" for n in names for t in tasks)) for s in strengths]
    return markdown(("strength", *(f"{n}: {t}" for n in names for t in tasks)), table)
