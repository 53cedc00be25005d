"""The tables of the guides on servers: heads and rows, from the figures in tools/results."""

import json
import math
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
DECODED = 32


def in_vllm():
    """Milliseconds of each way in vLLM, and their ratio to a server without adapters."""
    seconds = json.loads((RESULTS / "vllm.json").read_text())["seconds"]
    base = seconds["base"]
    table = [(n, *(f"{1000 * t[k]:.0f} ({t[k] / base[k]:.2f})" for k in base)) for n, t in seconds.items()]
    heads = [f"{what} of {n} request{'s' * (n != '1')}" for what, n in (key.split(", ") for key in base)]
    return ("ms (ratio to the base alone)", *heads), table


def to_four_bits():
    """What each way to 4 bits keeps of the adapter's gain in log-likelihood, and vLLM's tokens."""
    rows = json.loads((RESULTS / "vllm_road.json").read_text())["rows"]
    loss = {name: math.log(row["perplexity"]) for name, row in rows.items()}
    table = []
    for name, row in rows.items():
        base = next((b for b in ("GPTQ", "AWQ") if name.startswith(b)), "NF4")
        best = "NF4 and the adapter" if base == "NF4" else f"{base} and the adapter, kept"
        kept = f"{100 * (loss[base] - loss[name]) / (loss[base] - loss[best]):.1f} %" if name not in BARE else ""
        size = f"{row['mib']:.0f}" if "mib" in row else ""
        table.append((name, f"{row['perplexity']:.2f}", kept, size, _tokens(row.get("vllm", ()))))
    return ("model", "perplexity", "gain kept", "MiB", "prompts with torch's 32 tokens"), table


BARE = ("float32", "NF4", "GPTQ", "AWQ")
"""Rows without the adapter."""


def _tokens(found):
    """How many prompts, and how far ahead torch's token was where another came first."""
    if not found:
        return ""
    ties = [f"{each['margin']:.3f}" for each in found if each["tokens"] < DECODED]
    note = f"; the others by near ties ({', '.join(ties)})" if ties else ""
    return f"{len(found) - len(ties)} of {len(found)}{note}"


def runtimes():
    """For each runtime, how many of 32 tokens of each prompt are torch's, and torch's margin at the first other one."""
    results = json.loads((RESULTS / "runtimes.json").read_text())
    table = []
    for name, row in results["rows"].items():
        fold, _, runtime = name.partition(": ")
        ends = [(p["tokens"], p["margin"]) for p in row["prompts"]]
        cells = [f"{n}" if margin is None else f"{n} ({margin:.2g})" for n, margin in ends]
        size, _, note = row["note"].partition("; ")
        table.append((fold, runtime, ", ".join(cells), size, note))
    return ("fold", "runtime", "tokens (margin)", "file", "weights, as the report says"), table
