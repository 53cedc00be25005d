"""From NF4 and an adapter to 4 bits in vLLM: what each way keeps of the gain, and vLLM's tokens beside torch's.

    tools/environment-serve && tools/environment-layers
    .venv-layers/bin/python -m tools.bench.bench_vllm_road ADAPTER [--folder FOLDER] [--bases GPTQ AWQ]

SmolLM2-135M; ADAPTER was trained on its NF4 form, as the quickstart's oftfx-demo/adapter. Ways: the fold to floats
rounded anew (`oftfx.quantize`) to the nearest and by calibration, and the same adapter on 4-bit bases of GPTQ and AWQ,
kept and calibrated. Calibration is 8,192 tokens of the training text, perplexity that of 5,120 held-out ones. Each way
is saved for vLLM and asked for 32 greedy tokens of four prompts. FOLDER keeps what is done. Writes
tools/results/vllm_road.json.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import oftfx
from oftfx.demo import smollm, text
from oftfx.files import write_whole
from oftfx.model.structure import replace_module, structural_copy
from oftfx.terminal import render
from tools.bench.bench_vllm import PROMPTS, ROOT, Engine, compared, greedy

RESULTS = ROOT / "tools" / "results" / "vllm_road.json"
LENGTH, HELD_OUT, CALIBRATION = 128, 40, 64
GROUP = 32


@torch.no_grad()
def perplexity(model: nn.Module, data: Tensor) -> float:
    """Of each next token of ``data (n, length)``."""
    loss = 0.0
    for ids in data.split(4):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        loss += float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(loss / data[:, 1:].numel())


class Road:
    """The bench's state.

    Args:
        adapter: directory.
        folder: checkpoints, and the rows that are done.
    """

    def __init__(self, adapter: Path, folder: Path) -> None:
        self.adapter, self.folder = adapter, folder
        self.base, tokenizer = smollm.load()
        self.prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        self.held_out = text.blocks(tokenizer, text.read("test"), LENGTH)[:HELD_OUT]
        chosen = text.blocks(tokenizer, text.read("train"), LENGTH)[:CALIBRATION]
        self.calibration = [
            {"input_ids": i, "attention_mask": torch.ones_like(i), "use_cache": False} for i in chosen.split(4)
        ]
        self.file = folder / "rows.json"
        self.rows: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def row(self, name: str, make: Callable[[], nn.Module | oftfx.FoldResult], **save: Any) -> None:
        """A model's perplexity; of one that vLLM is to read its tokens there as well."""
        if name in self.rows:
            return
        made = make()
        model = made.model if isinstance(made, oftfx.FoldResult) else made
        row: dict[str, Any] = {"perplexity": perplexity(model, self.held_out)}
        if save and isinstance(made, oftfx.FoldResult):
            where = self.folder / "".join(c if c.isalnum() else "-" for c in name)
            made.save(where, server="vllm", **save)
            row["mib"] = sum(f.stat().st_size for f in where.glob("*.safetensors")) / 2**20
            wanted = [greedy(model, prompt) for prompt in self.prompts]
            del made, model
            engine = Engine(where, dtype="float16")
            row["vllm"] = compared(engine.ask(None, self.prompts, 32)["tokens"], wanted)
            engine.stop()
        self.rows[name] = row
        write_whole(self.file, (json.dumps(self.rows, indent=1) + "\n").encode())
        print(name, row, flush=True)

    def adapted(self, base: nn.Module) -> nn.Module:
        """A base with the adapter."""
        return oftfx.load_adapter(base, self.adapter, adapter="default").eval()

    def nf4(self) -> nn.Module:
        """The base that the adapter was trained on; the float model stays as it is."""
        return smollm.hold_still(smollm.quantize_nf4(structural_copy(self.base)))

    def rounded(self, group: int, calibrated: bool) -> oftfx.FoldResult:
        """NF4 and the adapter as floats, rounded anew."""
        floats = oftfx.fold(self.adapted(self.nf4()), quantized="float").model
        return oftfx.quantize(floats, group_size=group, calibration=self.calibration if calibrated else None)

    def grouped(self, kind: str) -> nn.Module:
        """The float model's layers in GPTQ (symmetric) or AWQ, each rounded to the nearest."""
        from oftfx.formats.awq import make_awq
        from oftfx.formats.gptq import make_gptq

        model: Any = structural_copy(self.base)
        head = model.get_output_embeddings()
        for module in list(model.modules()):
            if type(module) is nn.Linear and module is not head:
                made = make_gptq(module, sym=True) if kind == "GPTQ" else make_awq(module, group_size=GROUP)
                replace_module(model, module, made.eval())
        return model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("oftfx-bench/vllm-road"))
    parser.add_argument("--bases", nargs="*", default=["GPTQ"], choices=["GPTQ", "AWQ"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # the packages' own
    road = Road(args.adapter, args.folder)
    packed = {"save_as": "compressed-tensors"}
    road.row("float32", lambda: road.base)
    road.row("NF4", road.nf4)
    road.row("NF4 and the adapter", lambda: road.adapted(road.nf4()))
    for group in (32, 64):
        road.row(f"rounded by calibration, groups of {group}", lambda g=group: road.rounded(g, True), **packed)
    road.row("rounded to the nearest, groups of 32", lambda: road.rounded(32, False), **packed)
    for kind in args.bases:
        road.row(kind, lambda k=kind: road.grouped(k))
        road.row(
            f"{kind} and the adapter, kept",
            lambda k=kind: oftfx.fold(road.adapted(road.grouped(k)), quantized="keep"),
            **packed,
        )
        road.row(
            f"{kind} and the adapter, calibrated",
            lambda k=kind: oftfx.fold(
                road.adapted(road.grouped(k)), quantized="calibrate", calibration=road.calibration
            ),
            save_as=kind.lower(),
        )
    write_whole(RESULTS, (json.dumps({"rows": road.rows}, indent=1) + "\n").encode())
    rows = [(n, f"{r['perplexity']:.3f}", str([v["tokens"] for v in r.get("vllm", ())])) for n, r in road.rows.items()]
    print(render("perplexity, and tokens of 32 equal to torch's", ("model", "perplexity", "tokens"), rows))


if __name__ == "__main__":
    main()
