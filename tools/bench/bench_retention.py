"""What an adapter at so much of its strength has learnt and forgotten: SmolLM2, news against program code.

    tools/environment test
    PYTHONPATH=. .venv/bin/python tools/bench/bench_retention.py ADAPTER [--lora]

ADAPTER is the quickstart's (oftfx-demo/full/adapter: OFT with blocks of 32, 60 steps of 4x128 tokens on news, on an NF4
base). The new task is held-out news; the base's task, which no step has seen, is Python code: the standard library's.
Both are perplexities. At a strength of 1/2 a rotation turns half as far (`oftfx.retention`). With ``--lora`` a LoRA of
PEFT, rank 16, is trained for as many steps on the same batches, at each of three rates, and its update multiplied by
the strength. Writes tools/results/retention.json, from which tools/docs/update_tables.py makes the guide's table; what
is there is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import oftfx
from oftfx.demo import smollm, text
from oftfx.files import write_whole
from oftfx.training.minimise import Schedule, minimise

RESULTS = Path(__file__).parents[1] / "results" / "retention.json"
LENGTH, BLOCKS, STEPS, BATCH = 128, 48, 60, 4
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
FILES = ("argparse", "dataclasses", "functools", "json.decoder", "textwrap", "typing")
RATES = (2.5e-4, 6e-4, 1.5e-3)


def tasks(tokenizer: Any) -> dict[str, Tensor]:
    """Token ids ``(blocks, LENGTH)`` of both."""
    sources = [Path(importlib.util.find_spec(name).origin).read_text() for name in FILES]  # type: ignore[union-attr, arg-type]
    code = text.blocks(tokenizer, sources, LENGTH)
    chosen = torch.linspace(0, len(code) - 1, BLOCKS).long()  # of all files
    return {"news": text.blocks(tokenizer, text.read("test"), LENGTH)[:BLOCKS], "Python code": code[chosen]}


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """Of every token but the first of each block."""
    total = 0.0
    for batch in ids.split(4):
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


def by_oft(base: nn.Module, adapter: Path, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Rows of the rotations."""
    model = oftfx.load_adapter(base, adapter, adapter="news")
    curve = oftfx.retention(
        model,
        {task: lambda m, ids=ids: perplexity(m, ids) for task, ids in found.items()},  # type: ignore[misc]
        STRENGTHS,
        adapter="news",
    )
    return [{"adapter": "OFT", "rate": 2.5e-4, "strength": p.strength, **dict(p.scores)} for p in curve]


def by_lora(base: nn.Module, tokenizer: Any, rate: float, found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Rows of a LoRA that learns what the adapter has learnt."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layers = [n for n, m in base.named_modules() if "layers." in n and hasattr(m, "weight") and m.weight.dim() == 2]
    model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=layers))  # type: ignore[arg-type]
    train = text.blocks(tokenizer, text.read("train"), LENGTH)

    def loss(step: int) -> Tensor:
        ids = text.batch(train, step, BATCH)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    with tempfile.TemporaryDirectory() as steps:
        trained = [p for p in model.parameters() if p.requires_grad]
        minimise(loss, trained, Schedule(STEPS, rate), folder=Path(steps), report=_quiet)
    model.eval()
    scaled = [m for m in model.modules() if hasattr(m, "lora_A")]
    rows = []
    for strength in STRENGTHS:
        for module in scaled:
            module.scaling["default"] = strength  # alpha / r is 1
        scores = {task: perplexity(model, ids) for task, ids in found.items()}
        rows.append({"adapter": "LoRA r=16", "rate": rate, "strength": strength, **scores})
    return rows


def _quiet(step: int, loss: float) -> None:
    """Sixty steps need no bar."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--lora", action="store_true", help="train and measure LoRA as well")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")  # the packages' own
    base, tokenizer = smollm.load()
    base = smollm.hold_still(smollm.quantize_nf4(base))
    found, rows = tasks(tokenizer), json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for name, rate in [("OFT", 2.5e-4), *(("LoRA r=16", r) for r in RATES if asked.lora)]:
        if any(r["adapter"] == name and r["rate"] == rate for r in rows):
            continue
        fresh = copy.deepcopy(base)
        rows += by_oft(fresh, asked.adapter, found) if name == "OFT" else by_lora(fresh, tokenizer, rate, found)
        for row in rows[-len(STRENGTHS) :]:
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
        write_whole(RESULTS, (json.dumps({"rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
