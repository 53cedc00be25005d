"""Base, PEFT OFT, PEFT LoRA and oftfx on a CUDA device: random Llamas of the shapes of 1B and 8B, bfloat16 and NF4.

    .venv/bin/python tools/bench/gpu.py [--shapes 1B 8B] [--rounds N] [--out FILE]

A training step and its peak memory, prefill, a decoded token (eager, compiled, CUDA graph), fold and calibrating: one
process, interleaved, medians, ratios to the base or to PEFT. What fails is in the table by its error. Needs a GPU, and
writes nothing without one; ``--device cpu --tiny --out FILE`` runs all of it on a small model, to see that it runs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.terminal import render

warnings.simplefilter("ignore")

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DECODES = {"eager": None, "compiled": {"fullgraph": True}, "CUDA graph": {"mode": "reduce-overhead", "fullgraph": True}}


class Bench:
    """One model, its candidates, and what is measured of them."""

    def __init__(self, options, shape, storage):
        self.options, self.storage = options, storage
        self.tiny, self.device = options.tiny, torch.device(options.device)
        self.batch, self.length, self.tokens = (2, 16, 3) if self.tiny else (4, 1024, 32)
        torch.manual_seed(0)
        self.base = self.make_base(shape)
        self.ids = torch.randint(0, self.base.config.vocab_size, (self.batch, self.length), device=self.device)
        self.results = {}

    def make_base(self, shape):
        from transformers import LlamaConfig, LlamaForCausalLM

        vocabulary = 128 if self.tiny else 128256
        config = LlamaConfig(**shape, vocab_size=vocabulary, num_key_value_heads=2 if self.tiny else 8)
        with self.device:
            model = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).eval()
        if self.storage == "NF4":
            for name, layer in [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in NAMES]:
                model.set_submodule(name, self.nf4(layer))
        return model

    def nf4(self, linear):
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.cpu(), requires_grad=False, quant_type="nf4")
        return layer.to(self.device)

    def candidates(self):
        import peft

        oft = peft.OFTConfig(oft_block_size=32, target_modules=NAMES)
        return {
            "base": lambda: self.base,
            "PEFT OFT": lambda: self.peft(oft),
            "PEFT LoRA r=16": lambda: self.peft(peft.LoraConfig(r=16, target_modules=NAMES)),
            "oftfx": lambda: self.ours(OFT(32)),
            "oftfx, share_input": lambda: self.ours(OFT(32, share_input=True)),
        }

    def peft(self, config):
        import peft

        # Its own modules over the same weights.
        shared = copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})
        model = peft.get_peft_model(shared, config)
        for name, parameter in model.named_parameters():
            if "oft_R" in name or "lora_B" in name:
                nn.init.normal_(parameter, std=0.01)
        return model

    def ours(self, spec):
        model = oftfx.transform(self.base, [oftfx.Rule(f"*.{n}", spec) for n in NAMES])
        for parameter in oftfx.adapter_parameters(model):
            nn.init.normal_(parameter, std=0.01)
        return model

    # -- what is measured ---------------------------------------------------------------------------

    def step(self, model):
        model.train()
        for parameter in model.parameters():
            parameter.grad = None
        model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()

    @torch.no_grad()
    def prefill(self, model):
        model.eval()(input_ids=self.ids[:1], use_cache=False)

    def decoder(self, model, compile_options):
        from transformers import StaticCache

        model.eval()
        if compile_options is not None and self.tiny:
            compile_options = {"backend": "aot_eager"}
        run = model if compile_options is None else torch.compile(model, **compile_options)
        cache = StaticCache(config=self.base.config, max_cache_len=64)
        position = torch.zeros(1, dtype=torch.long, device=self.device)

        @torch.no_grad()
        def tokens():
            start = self.now()
            for index in range(self.tokens):
                position.fill_(index)
                run(input_ids=self.ids[:1, :1], past_key_values=cache, cache_position=position, use_cache=True)
            return (self.now() - start) / self.tokens

        return tokens

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, function):
        start = self.now()
        result = function()
        return result if isinstance(result, float) else self.now() - start

    def interleaved(self, what, functions):
        """Median seconds of each, one call a round in turn, after one that is not counted."""
        print(f"{what} ...", file=sys.stderr, flush=True)
        times = {name: [] for name in functions}
        failed = {}
        for round_ in range(self.options.rounds + 1):
            for name, function in functions.items():
                if name not in failed:
                    try:
                        seconds = self.timed(function)
                    except Exception as error:  # of any kind: it is in the table
                        failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
                        continue
                    times[name] += [seconds] if round_ else []
        self.results[what] = {n: failed.get(n) or statistics.median(t) for n, t in times.items()}

    def memory(self, models):
        """Peak bytes of a training step over what is there before; None on a CPU, which does not count them."""
        found = {}
        for name, model in models.items():
            if self.device.type != "cuda":
                found[name] = None
                continue
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.step(model)
            found[name] = torch.cuda.max_memory_allocated(self.device) - before
        self.results["peak bytes of a training step"] = found

    def folds(self):
        """Each on a fresh model, whose making is not counted."""
        inputs = [{"input_ids": self.ids[:1]}]
        calls = {"oftfx": partial(self.fold, quantized="float" if self.storage == "NF4" else "keep")}
        if self.storage == "NF4":
            calls["oftfx, requantize"] = partial(self.fold, quantized="requantize")
            calls["oftfx, calibrate"] = partial(self.fold, quantized="calibrate", calibration=inputs)
        calls["PEFT OFT"] = self.merge
        self.interleaved("fold of all layers", calls)

    def fold(self, **options):
        model = self.ours(OFT(32))
        return self.timed(lambda: oftfx.fold(model, **options))

    def merge(self):
        model = self.candidates()["PEFT OFT"]()
        # Its merge writes into the weights, which are everybody's here.
        for layer in model.modules():
            if hasattr(layer, "base_layer") and type(layer.base_layer) is nn.Linear:
                layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.clone(), requires_grad=False)
        return self.timed(lambda: model.merge_and_unload() and None)

    def run(self):
        models = {name: make() for name, make in self.candidates().items()}
        trained = {n: m for n, m in models.items() if n != "base"}
        self.interleaved("training step", {n: partial(self.step, m) for n, m in trained.items()})
        self.memory(trained)
        self.interleaved("prefill", {n: partial(self.prefill, m) for n, m in models.items()})
        for how, compile_options in DECODES.items():
            if how == "CUDA graph" and self.device.type != "cuda":
                continue
            torch._dynamo.reset()
            self.interleaved(f"decode, {how}", {n: self.decoder(m, compile_options) for n, m in models.items()})
        torch._dynamo.reset()
        del models, trained
        gc.collect()
        self.folds()
        return self.results


def rows_of(results):
    """``(model, what, candidate, value, ratio, to)`` for the table."""
    for model, measured in results.items():
        for what, values in measured.items():
            to = "base" if isinstance(values.get("base"), float) else "PEFT OFT"
            reference = values.get(to)
            for name, value in values.items():
                if value is None or isinstance(value, str):
                    yield model, what, name, value or "not counted here", "", ""
                    continue
                shown = f"{value / 2**20:.0f} MiB" if "bytes" in what else f"{1000 * value:.2f} ms"
                known = isinstance(reference, (int, float)) and reference > 0
                yield model, what, name, shown, f"{value / reference:.2f}" if known else "", to if known else ""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model and few rounds: shows that it runs, no more")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here, so nothing was measured (--device cpu --tiny --out FILE shows that this runs)")
    if torch.device(options.device).type != "cuda" and not options.tiny:
        sys.exit("figures are of a CUDA device; on any other, only --tiny is possible")
    if options.tiny and options.out is None:
        sys.exit("--tiny measures nothing worth keeping: say where it goes with --out")
    options.rounds = 1 if options.tiny else options.rounds
    results = {}
    for name, shape in {"tiny": TINY}.items() if options.tiny else {n: SHAPES[n] for n in options.shapes}.items():
        for storage in ("bfloat16", "NF4"):
            if storage == "NF4" and find_spec("bitsandbytes") is None:
                print("bitsandbytes is not installed: no NF4")
                continue
            results[f"{name}, {storage}"] = Bench(options, shape, storage).run()
            gc.collect()
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "cpu"
    print(render(device, ("model", "what", "candidate", "value", "ratio", "to"), list(rows_of(results))))
    out = options.out or Path(__file__).parents[1] / "results" / "gpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"device": device, "torch": torch.__version__, "tiny": options.tiny, "results": results}
    out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
