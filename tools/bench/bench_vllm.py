"""OFT adapters in vLLM on a CPU: torch's tokens, and a request's cost beside LoRA's, a folded model's and the base's.

    tools/environment-serve
    .venv/bin/python tools/bench/bench_vllm.py ADAPTER [--rounds 5]

SmolLM2-135M in float32; ADAPTER is one in PEFT's convention, the quickstart's oftfx-demo/adapter. One engine has the
base, the OFT adapter and a LoRA of rank 16 on the same layers, another the folded model without adapters; both live,
and take turns. Times are of 1 and of 8 requests: a prompt of 128 tokens, and a token after it. Writes
tools/results/vllm.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import oftfx
from oftfx.demo import smollm
from oftfx.evaluation import tokens as by_torch
from oftfx.files import write_whole
from oftfx.terminal import render

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tools" / "results" / "vllm.json"
PROMPTS = (
    "The Australian government announced",
    "Once upon a time, in a small village by the sea,",
    "Police in Sydney say that two men",
    "The capital of France is",
)
COUNT, LENGTH, DECODED = 32, 128, 16


class Engine:
    """A process of ``vllm_timed.py``."""

    def __init__(self, checkpoint: Path, slots: int = 0, dtype: str = "float32") -> None:
        quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        script = Path(__file__).with_name("vllm_timed.py")
        command = [ROOT / ".venv-vllm" / "bin" / "python", script, checkpoint, dtype, *([slots] if slots else [])]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | quiet | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            cwd=tempfile.gettempdir(),
        )
        self._answer()

    def ask(self, adapter: Path | None, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Greedy tokens and seconds."""
        task = {"adapter": adapter and str(adapter), "prompts": prompts, "count": count}
        self.process.stdin.write(json.dumps(task) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self.process.stdout:  # type: ignore[union-attr]
            if line.startswith("="):
                return json.loads(line[1:])
        raise RuntimeError(f"vLLM ended with {self.process.wait()}")

    def stop(self) -> None:
        """End it."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def greedy(model: nn.Module, ids: list[int], count: int = COUNT) -> tuple[list[int], list[float]]:
    """torch's tokens, and by how much each was ahead of the second best."""
    said = by_torch.greedy(model, ids, count)
    return [*said.tokens], [*said.margins]


def compared(got: list[list[int]], wanted: list[tuple[list[int], list[float]]]) -> list[dict[str, Any]]:
    """For each prompt how many tokens are torch's, and torch's margin at the first that is not."""
    rows = []
    for tokens, (expected, margins) in zip(got, wanted, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), COUNT)
        rows.append({"tokens": same, "margin": margins[same] if same < COUNT else None})
    return rows


def lora(base: nn.Module, directory: Path) -> Path:
    """A LoRA of rank 16 on every linear layer but the head, with random numbers, as a directory."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(directory)
    return directory


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the packages' own
    base, tokenizer = smollm.load()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base.save_pretrained(folder / "base")
        expected = {"base": [greedy(base, p) for p in prompts]}
        lora(copy.deepcopy(base), folder / "lora")
        model = oftfx.load_adapter(base, args.adapter, adapter="oft").eval()
        oftfx.set_adapter(model, "oft")
        folded = oftfx.fold(model).model.eval()
        folded.save_pretrained(folder / "folded")
        expected["OFT"] = [greedy(model, p) for p in prompts]
        one, other = Engine(folder / "base", 2), Engine(folder / "folded")
        plain = Engine(folder / "base")
        ways = {
            "base": (plain, None),
            "folded": (other, None),
            "base, beside adapters": (one, None),
            "LoRA r=16": (one, folder / "lora"),
            "OFT": (one, args.adapter.absolute()),
        }
        tokens = {}
        for name, key in (("base", "base"), ("base, beside adapters", "base"), ("OFT", "OFT"), ("folded", "OFT")):
            engine, adapter = ways[name]
            tokens[name] = compared(engine.ask(adapter, prompts, COUNT)["tokens"], expected[key])
        times: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
        generator = torch.Generator().manual_seed(0)
        for _ in range(args.rounds + 1):
            for size in (1, 8):
                ids = torch.randint(0, len(tokenizer), (size, LENGTH), generator=generator).tolist()
                for name, (engine, adapter) in ways.items():
                    first = engine.ask(adapter, ids, 1)["seconds"]
                    whole = engine.ask(adapter, ids, 1 + DECODED)["seconds"]
                    times[name].setdefault(f"prompt, {size}", []).append(first)
                    times[name].setdefault(f"token, {size}", []).append((whole - first) / DECODED)
        for engine in (one, other, plain):
            engine.stop()
    seconds = {n: {k: statistics.median(v[1:]) for k, v in t.items()} for n, t in times.items()}
    figures = {"threads": torch.get_num_threads(), "tokens": tokens, "seconds": seconds}
    write_whole(RESULTS, (json.dumps(figures, indent=1) + "\n").encode())
    keys = list(seconds["base"])
    rows = [(n, *(f"{1000 * t[k]:.0f} ({t[k] / seconds['base'][k]:.2f})" for k in keys)) for n, t in seconds.items()]
    print(render("ms, and ratio to the base without adapters", ("way", *keys), rows))
    for name, found in tokens.items():
        print(name, "tokens equal to torch's:", [row["tokens"] for row in found], [row["margin"] for row in found])


if __name__ == "__main__":
    main()
