"""Whether calibrating by few tokens is ever worse than nearest rounding: every layer of SmolLM2, on held-out text.

    PYTHONPATH=. .venv/bin/python tools/bench/bench_few_tokens.py ADAPTER [--every 5]

For each layer and number of tokens: `calibrate`, the nearest codes and the old ones, as output error
``|X (W_folded - W')^T| / |X W'^T|`` on inputs from articles that neither the adapter nor the rounding has seen. ADAPTER
is the quickstart's (oftfx-demo/adapter). Writes tools/results/few_tokens.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import oftfx
from oftfx.demo import smollm, text
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned
from oftfx.formats.registry import format_of
from oftfx.passes.quantized.roundings import KEEP, NEAREST, best_rounding, values_of
from oftfx.placement.find import rotated_sites

RESULTS = Path(__file__).parents[1] / "results" / "few_tokens.json"
LENGTH, TOKENS = 128, (128, 512, 2048, 8192)


@torch.no_grad()
def inputs_of(model: nn.Module, layers: list[nn.Module], ids: Tensor) -> dict[nn.Module, Tensor]:
    """What each layer reads, ``(rows, in)``; layers that read the same tensor share it."""
    found: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    first: dict[int, Tensor] = {}

    def note(layer: nn.Module, args: Any) -> None:
        x = first.setdefault(id(args[0]), args[0])
        found[layer].append(x.flatten(0, 1))

    handles = [layer.register_forward_pre_hook(note, prepend=True) for layer in layers]
    for batch in ids.split(4):
        first.clear()
        model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def measure(
    sites: dict[str, Turned], seen: dict[nn.Module, Tensor], fresh: dict[nn.Module, Tensor], say: Callable[..., Any]
) -> list[dict[str, Any]]:
    """A row a layer and number of tokens."""
    rows = []
    for fqn, site in sites.items():
        held = fresh[site.module]
        wanted = held @ site.target.T

        def error(state: Any, site: Turned = site, held: Tensor = held, wanted: Tensor = wanted) -> float:
            return float((held @ values_of(site, state).T - wanted).norm() / wanted.norm())

        for tokens in TOKENS:
            some = seen[site.module][:tokens].view(-1, min(tokens, 4 * LENGTH), held.shape[1])
            shown = Shown(list(some), [None] * len(some))
            best = best_rounding(site, shown)
            row = {"site": fqn, "tokens": tokens, "way": str(best.way), "calibrate": error(best.state)}
            row |= {"nearest": error(NEAREST.state(site, shown)), "old codes": error(KEEP.state(site, shown))}
            rows.append(row)
            say(f"{fqn} {tokens}: {row['calibrate']:.4f} against {row['nearest']:.4f}, {row['old codes']:.4f}")
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--every", type=int, default=1, help="only every so manieth layer")
    args = parser.parse_args()
    base, tokenizer = smollm.load()
    model = oftfx.transform(smollm.hold_still(smollm.quantize_nf4(base)), {"all-linear": oftfx.OFT(32)})
    oftfx.load_adapter(model, args.adapter)
    placements = dict(list(rotated_sites(model))[:: args.every])
    sites = {f: s for f, p in placements.items() if (s := Turned.of(f, p, format_of(p.module))) is not None}  # type: ignore[arg-type]
    layers = [site.module for site in sites.values()]
    seen = inputs_of(model, layers, text.blocks(tokenizer, text.read("train"), LENGTH)[: max(TOKENS) // LENGTH])
    fresh = inputs_of(model, layers, text.blocks(tokenizer, text.read("test"), LENGTH)[:16])
    rows = measure(sites, seen, fresh, lambda line: print(line, flush=True))
    summary = {}
    for tokens in TOKENS:
        ratios = torch.tensor([r["calibrate"] / r["nearest"] for r in rows if r["tokens"] == tokens])
        summary[str(tokens)] = {
            "layers": len(ratios),
            "median": float(ratios.median()),
            "largest": float(ratios.max()),
            "over 1 %": int((ratios > 1.01).sum()),
        }
        print(tokens, summary[str(tokens)])
    RESULTS.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
