"""Surgery and folds beside their floors: one process, by turns, medians, ratios, and how they grow with depth.

    python tools/bench/bench_scaling.py [--rounds 5] [--out FILE]

`transform` of a Llama of 48 tiny layers beside PEFT's `get_peft_model`; plan, transform and fold for 6 to 48 layers;
the fold of one 4096 x 4096 weight beside a copy into memory that is there, and beside the batched product alone; the
fold of four Llama layers of width 2048 beside `copy.deepcopy`. The garbage collector is off while a clock runs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import time
import warnings
from pathlib import Path

import torch

import oftfx
from oftfx import OFT
from oftfx.terminal import render

warnings.simplefilter("ignore")
RULES = {"all-linear": OFT(32)}
DEPTHS = (6, 12, 24, 48)


def llama(layers, width, inner):
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, vocab_size=256, **heads)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def rotated(base):
    model = oftfx.transform(copy.deepcopy(base), RULES, inplace=True)
    for parameter in oftfx.adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.01)
    return model


def peft(model):
    from peft import OFTConfig, get_peft_model

    return get_peft_model(model, OFTConfig(oft_block_size=32, target_modules="all-linear"))


def medians(rounds, **sides):
    """Seconds of each; a side is a pair (what to prepare, what to time). The first round is not counted."""
    found = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, (prepare, run) in sides.items():
            given = prepare()
            gc.collect()
            gc.disable()
            start = time.perf_counter()
            run(given)
            seconds = time.perf_counter() - start
            gc.enable()
            if round_:
                found[name].append(seconds)
    return {name: statistics.median(times) for name, times in found.items()}


def surgery(rounds):
    base = llama(48, 64, 128)
    fresh = lambda: copy.deepcopy(base)  # noqa: E731
    ours = lambda model: oftfx.transform(model, RULES, inplace=True)  # noqa: E731
    return medians(rounds, oftfx=(fresh, ours), peft=(fresh, peft))


def growth(rounds):
    """Exponents of seconds in the number of layers, by least squares of the logarithms."""
    times = {}
    for layers in DEPTHS:
        base = llama(layers, 64, 128)
        times[layers] = medians(
            rounds,
            plan=(lambda b=base: b, lambda m: oftfx.plan(m, RULES)),
            transform=(lambda b=base: copy.deepcopy(b), lambda m: oftfx.transform(m, RULES, inplace=True)),
            fold=(lambda b=base: rotated(b), lambda m: oftfx.fold(m, inplace=True)),
        )
    x = [math.log(n) for n in DEPTHS]
    exponents = {}
    for what in times[DEPTHS[0]]:
        y = [math.log(times[n][what]) for n in DEPTHS]
        exponents[what] = statistics.linear_regression(x, y).slope
    return {"seconds": times, "exponents": exponents}


def one_weight(rounds, dtype):
    base = torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False, dtype=dtype)).requires_grad_(False)
    weight, there = base[0].weight.detach(), torch.zeros(4096, 4096, dtype=dtype)
    wide = weight.float()
    blocks, made = torch.randn(128, 32, 32), torch.zeros(4096, 4096)
    views = [t.view(4096, 128, 32).transpose(0, 1) for t in (wide, made)]
    return medians(
        rounds,
        fold=(lambda: rotated(base), lambda m: oftfx.fold(m, inplace=True)),
        copy=(lambda: None, lambda _: there.copy_(weight)),
        product=(lambda: None, lambda _: torch.bmm(views[0], blocks, out=views[1])),
    )


def four_layers(rounds):
    base = llama(4, 2048, 5632)
    return medians(
        rounds,
        fold=(lambda: rotated(base), lambda m: oftfx.fold(m, inplace=True)),
        deepcopy=(lambda: base, copy.deepcopy),
    )


def rows_of(results):
    """What, milliseconds, beside what, and the ratio; growth last."""
    rows = []
    for what, seconds in results.items():
        if what not in ("threads", "growth"):
            (_, own), *others = seconds.items()
            rows += [(what, f"{1000 * own:.0f}", name, f"{own / value:.2f}") for name, value in others]
    found = results["growth"]["exponents"]
    return rows + [(f"{what}, 6 to 48 layers", "", "growth exponent", f"{e:.2f}") for what, e in found.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "scaling.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {
        "threads": torch.get_num_threads(),
        "transform, 48 tiny layers": surgery(options.rounds),
        "fold, 4096x4096 float32": one_weight(options.rounds, torch.float32),
        "fold, 4096x4096 bfloat16": one_weight(options.rounds, torch.bfloat16),
        "fold, 4 Llama layers of 2048": four_layers(options.rounds),
        "growth": growth(max(2, options.rounds // 2)),
    }
    rows = rows_of(results)
    print(render("Beside the floors", ("what", "ms", "beside", "ratio"), rows))
    options.out.write_text(json.dumps({**results, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
