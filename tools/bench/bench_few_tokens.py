"""Whether calibrating by few tokens is ever worse than nearest rounding: layers of SmolLM2, on held-out text.

    tools/environment-layers
    PYTHONPATH=. .venv-layers/bin/python tools/bench/bench_few_tokens.py ADAPTER [--format "gptq 4"] [--every 10]

For each format, layer and number of tokens: `calibrate`, the nearest codes and the old ones, as output error
``|X (W_folded - W')^T| / |X W'^T|`` on inputs from articles that neither the adapter nor the rounding has seen. ADAPTER
is one that was trained on NF4 (the quickstart's oftfx-demo/adapter); its rotations turn the layers of every format.
Adds to tools/results/few_tokens.json; what that has is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import oftfx
from oftfx.demo import smollm, text
from oftfx.files import write_whole
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned
from oftfx.formats.registry import format_of
from oftfx.formats.scalar import ScalarFormat
from oftfx.passes.quantized.judged import values_of
from oftfx.passes.quantized.roundings import KEEP, NEAREST, best_rounding
from oftfx.placement.find import rotated_sites
from tools.bench.fold_updates import layers

RESULTS = Path(__file__).parents[1] / "results" / "few_tokens.json"
LENGTH, TOKENS = 128, (128, 512, 2048, 8192)


@torch.no_grad()
def inputs_of(model: nn.Module, modules: list[nn.Module], ids: Tensor) -> dict[nn.Module, Tensor]:
    """What each layer reads, ``(rows, in)``; layers that read the same tensor share it."""
    found: dict[nn.Module, list[Tensor]] = {layer: [] for layer in modules}
    first: dict[int, Tensor] = {}

    def note(layer: nn.Module, args: Any) -> None:
        x = first.setdefault(id(args[0]), args[0])
        found[layer].append(x.flatten(0, 1))

    handles = [layer.register_forward_pre_hook(note, prepend=True) for layer in modules]
    for batch in ids.split(4):
        first.clear()
        model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@torch.no_grad()
def site_of(linear: nn.Module, make: Callable[[Any], nn.Module], skew: Tensor) -> Turned | None:
    """A layer in a format with its rotation; None where its codes are not single weights'."""
    layer = make(copy.deepcopy(linear).requires_grad_(False))
    if not isinstance(format_of(layer), ScalarFormat):
        return None
    model = oftfx.transform(nn.Sequential(layer), {"0": oftfx.OFT(32)})
    for parameter in oftfx.adapter_parameters(model):
        parameter.copy_(skew)
    ((fqn, placement),) = rotated_sites(model)
    return Turned.of(fqn, placement, format_of(placement.module))  # type: ignore[arg-type]


@torch.no_grad()
def measure(site: Turned, seen: Tensor, fresh: Tensor) -> Iterator[dict[str, Any]]:
    """A row a number of tokens."""
    wanted = fresh @ site.target.T

    def error(state: Any) -> float:
        return float((fresh @ values_of(site, state).T - wanted).norm() / wanted.norm())

    for tokens in TOKENS:
        some = seen[:tokens].view(-1, min(tokens, 4 * LENGTH), fresh.shape[1])
        shown = Shown(list(some), [None] * len(some))
        best = best_rounding(site, shown)
        row = {"tokens": tokens, "way": str(best.way), "calibrate": error(best.state)}
        yield row | {"nearest": error(NEAREST.state(site, shown)), "old codes": error(KEEP.state(site, shown))}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios to nearest rounding, and to the better of nearest and old codes, by format and tokens."""
    found = []
    for key in dict.fromkeys((r["format"], r["tokens"]) for r in rows):
        here = [r for r in rows if (r["format"], r["tokens"]) == key]
        nearest = torch.tensor([r["calibrate"] / r["nearest"] for r in here])
        better = torch.tensor([r["calibrate"] / min(r["nearest"], r["old codes"]) for r in here])
        found.append(
            {
                "format": key[0],
                "tokens": key[1],
                "layers": len(here),
                "median": float(nearest.median()),
                "largest": float(nearest.max()),
                "over 1 %": int((nearest > 1.01).sum()),
                "largest to the better of nearest and old": float(better.max()),
            }
        )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--format", action="append", help="of tools/bench/fold_updates.py; bnb nf4 unless given; all")
    parser.add_argument("--every", type=int, default=1, help="only every so manieth layer")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the packages' own
    makers = layers()
    names = list(makers) if args.format == ["all"] else args.format or ["bnb nf4"]
    base, tokenizer = smollm.load()
    model = oftfx.transform(smollm.hold_still(smollm.quantize_nf4(copy.deepcopy(base))), {"all-linear": oftfx.OFT(32)})
    oftfx.load_adapter(model, args.adapter, adapter="trained")
    oftfx.set_adapter(model, "trained")
    placements = dict(list(rotated_sites(model))[:: args.every])
    modules = [p.module for p in placements.values()]
    seen = inputs_of(model, modules, text.blocks(tokenizer, text.read("train"), LENGTH)[: max(TOKENS) // LENGTH])
    fresh = inputs_of(model, modules, text.blocks(tokenizer, text.read("test"), LENGTH)[:16])
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    done = {(r["format"], r["site"]) for r in rows}
    for name in names:
        for fqn, placement in placements.items():
            if (name, fqn) in done:
                continue
            skew = placement.rotations["trained"].skew.detach()
            site = site_of(base.get_submodule(fqn), makers[name], skew)
            if site is None:
                print(f"{name}: its codes are not single weights'")
                break
            inputs = seen[placement.module], fresh[placement.module]
            rows += [{"format": name, "site": fqn, **row} for row in measure(site, *inputs)]
            last = rows[-1]
            print(
                f"{name} {fqn}: {last['calibrate']:.4f} against {last['nearest']:.4f}, {last['old codes']:.4f}",
                flush=True,
            )
            write_whole(RESULTS, (json.dumps({"summary": summary(rows), "rows": rows}, indent=1) + "\n").encode())
    for line in summary(rows):
        print(line)


if __name__ == "__main__":
    main()
