"""Base, PEFT OFT, PEFT LoRA and oftfx on the real SmolLM2-135M: one process, interleaved, medians, ratios to base.

    .venv/bin/python tools/bench/bench_speed.py [--rounds N] [--out FILE]

All 210 linear layers are adapted; OFT with block 32 and five Cayley-Neumann terms, LoRA with rank 16. Every adapter
has random weights, so nothing is skipped as an identity. The machine is noisy: compare ratios of one run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
import warnings
from pathlib import Path

import torch

import oftfx
from oftfx import OFT
from oftfx.demo import smollm
from oftfx.onnx.decoders.decoder import cache_name
from oftfx.terminal import render

warnings.simplefilter("ignore")


def peft_model(base, config):
    import peft

    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if "oft_R" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def ours(base, spec):
    model = oftfx.transform(base, {"all-linear": spec})
    for parameter in oftfx.adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.01)
    return model


def candidates(base):
    import peft

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "base": lambda: base,
        "PEFT OFT": lambda: peft_model(base, peft.OFTConfig(oft_block_size=32, target_modules=names)),
        "PEFT LoRA r=16": lambda: peft_model(base, peft.LoraConfig(r=16, target_modules=names)),
        "oftfx": lambda: ours(base, OFT(32)),
        "oftfx, share_input": lambda: ours(base, OFT(32, share_input=True)),
        "oftfx, folded": lambda: oftfx.fold(ours(base, OFT(32))).model,
    }


def forward(model, ids):
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def decode(model, ids, tokens=16):
    """Seconds a token, after the prompt."""
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        name, last = cache_name(out), ids[:, -1:]
        start = time.perf_counter()
        for _ in range(tokens):
            out = model(input_ids=last, use_cache=True, **{name: out[name]})
        return (time.perf_counter() - start) / tokens


def step(model, ids):
    for parameter in model.parameters():
        parameter.grad = None
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - start
    return result if isinstance(result, float) else seconds


def interleaved(models, function, ids, rounds, training=False):
    """Median seconds of each, one call a round in turn, after one that is not counted."""
    times = {name: [] for name in models}
    for model in models.values():
        model.train(training)
    for round_ in range(rounds + 1):
        for name, model in models.items():
            seconds = timed(function, model, ids)
            if round_:
                times[name].append(seconds)
    return {name: statistics.median(t) for name, t in times.items()}


def merge_seconds(base, rounds):
    """Fold of all 210 layers against PEFT's merge; each in place on a fresh copy."""
    times = {"PEFT OFT": [], "oftfx": []}
    makers = candidates(base)
    for _ in range(rounds):
        model = makers["PEFT OFT"]()
        times["PEFT OFT"].append(timed(lambda m=model: m.merge_and_unload() and None))
        model = oftfx.transform(copy.deepcopy(base), {"all-linear": OFT(32)}, inplace=True)
        for parameter in oftfx.adapter_parameters(model):
            torch.nn.init.normal_(parameter, std=0.01)
        times["oftfx"].append(timed(lambda m=model: oftfx.fold(m, inplace=True) and None))
        gc.collect()
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "speed.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    base, _ = smollm.load()
    insert, models = {}, {}
    for name, make in candidates(base).items():
        start = time.perf_counter()
        models[name] = make()
        insert[name] = time.perf_counter() - start
    ids = torch.randint(0, 49152, (1, 128))
    results = {
        "forward 1x128": interleaved(models, forward, ids, options.rounds),
        "decode a token": interleaved(models, decode, ids[:, :16], options.rounds),
    }
    trained = {n: m for n, m in models.items() if n not in ("base", "oftfx, folded")}
    results["training step 4x128"] = interleaved(trained, step, ids.expand(4, 128), max(2, options.rounds // 2), True)
    results["fold of all layers"] = merge_seconds(base, max(2, options.rounds // 3))
    rows = []
    for what, seconds in results.items():
        reference = seconds.get("base") or seconds["PEFT OFT"]
        for name, value in seconds.items():
            to = "base" if "base" in seconds else "PEFT OFT"
            rows.append((what, name, f"{1000 * value:.0f}", f"{value / reference:.2f}", to))
    print(render("SmolLM2-135M, float32, CPU", ("what", "model", "ms", "ratio", "to"), rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"threads": torch.get_num_threads(), "seconds": results, "insert_seconds": insert}
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
