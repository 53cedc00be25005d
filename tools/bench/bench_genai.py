"""SmolLM2-135M in ONNX Runtime GenAI: our directories beside those of GenAI's own builder, of the same folded weights.

    PYTHONPATH=. .venv/bin/python tools/bench/bench_genai.py make
    PYTHONPATH=. .venv-layers/bin/python tools/bench/bench_genai.py gptq     # gptqmodel is in that environment
    PYTHONPATH=. .venv/bin/python tools/bench/bench_genai.py run

``make`` and ``gptq`` write directories into a folder (1 GB each at most); those that are there are kept. ``run``
counts greedy tokens that equal float32 torch's, then times all of them in turn: a prompt of 128 tokens, then 64
tokens, medians of 5 rounds, and their ratios to the builder's. Writes tools/results/genai.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

import oftfx
from oftfx.demo import smollm
from oftfx.onnx.accuracy import set_level

RESULTS = Path(__file__).parents[1] / "results" / "genai.json"
PROMPT, DECODED, ROUNDS, COMPARED = 128, 64, 5, 32
PROMPTS = (
    "Once upon a time, a small robot",
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
)
RULES = {"*_proj": oftfx.OFT(32, share_input=True)}
EXACT = {"accuracy_level": "1", "nodes_to_exclude": "/lm_head/MatMul", "shared_embeddings": "false"}
"""With these the builder's int4 computes what the weights say; by its own choice it rounds activations and the head."""


def rotated(model: nn.Module) -> nn.Module:
    """With an adapter whose effect is that of a trained one."""
    model = oftfx.transform(model, RULES)
    torch.manual_seed(0)
    for parameter in oftfx.adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.003)
    return model


def expected(model: nn.Module, tokenizer: Any) -> list[list[int]]:
    """Greedy tokens of torch."""
    found = []
    for text in PROMPTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        settings = {"do_sample": False, "max_new_tokens": COMPARED, "min_new_tokens": COMPARED, "eos_token_id": None}
        result = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        found.append(result[0, ids.shape[1] :].tolist())
    return found


def checkpoint(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """As transformers writes it, for the builder, with the tokens that it has to give."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "expected.json").write_text(json.dumps(expected(model, tokenizer)))


def built(source: Path, target: Path, precision: str, **options: str) -> None:
    """By GenAI's own builder."""
    if (target / "genai_config.json").exists() or not source.exists():
        return
    more = [f"{n}={v}" for n, v in options.items()]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(target)]
    command += ["-p", precision, "-e", "cpu", "-c", str(target / "cache")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, *(["--extra_options", *more] if more else [])], check=True, env=environment)
    (target / "expected.json").write_bytes((source / "expected.json").read_bytes())


def ours(model: nn.Module, source: Path, target: Path, **options: Any) -> None:
    """By `oftfx.export_genai`."""
    if (target / "genai_config.json").exists():
        return
    start = time.perf_counter()
    report = oftfx.export_genai(model, target, verify=False, **options)
    (target / "expected.json").write_bytes((source / "expected.json").read_bytes())
    print(
        f"{target.name}: {sum(report.operators.values())} nodes, {time.perf_counter() - start:.0f} s, {report}",
        flush=True,
    )


def make(folder: Path) -> None:
    """Float directories, and NF4 ones."""
    base, tokenizer = smollm.load()
    model = rotated(base)
    folded = oftfx.fold(model).model
    source = folder / "checkpoint-float"
    if not source.exists():
        checkpoint(folded, tokenizer, source)
    built(source, folder / "float-builder", "fp32")
    ours(folded, source, folder / "float")
    ours(folded, source, folder / "float-plain", fused=False)
    ours(model, source, folder / "float-swappable", adapters="swappable")
    ours(model, source, folder / "float-fixed")
    nf4 = rotated(smollm.quantize_nf4(smollm.load()[0]))
    source = folder / "checkpoint-nf4"
    source.mkdir(exist_ok=True)
    result = oftfx.fold(nf4, quantized="requantize").model
    if not (source / "expected.json").exists():
        (source / "expected.json").write_text(json.dumps(expected(result, tokenizer)))
    ours(result, source, folder / "nf4")


def gptq(folder: Path) -> None:
    """Int4 in groups of 32, folded by requantizing, in gptqmodel's layers; saved for the builder as version 1."""
    from oftfx.formats.gptq import make_gptq
    from oftfx.model.structure import replace_module

    base, tokenizer = smollm.load()
    head = base.get_output_embeddings()
    for module in list(base.modules()):
        if type(module) is nn.Linear and module is not head:
            replace_module(base, module, make_gptq(module, group_size=32))
    folded = oftfx.fold(rotated(base), quantized="requantize").model
    source = folder / "checkpoint-gptq"
    if not source.exists():
        as_version_1(folded, tokenizer, source)
    ours(folded, source, folder / "gptq")
    rounded = folder / "gptq-level-4"
    if not rounded.exists():
        shutil.copytree(folder / "gptq", rounded)
        set_level(rounded / "model.onnx", 4)
    ours(folded, source, folder / "gptq-plain", fused=False)


def as_version_1(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """The published layout: zeros less one."""
    from safetensors.torch import save_file

    state = {n: v.clone() for n, v in model.state_dict().items() if n != "lm_head.weight"}
    for name, value in state.items():
        if name.endswith(".qzeros"):
            # Eight zeros a word; those of `make_gptq` are 8, so none borrows from its neighbour.
            state[name] = value - 0x11111111
    folder.mkdir(parents=True)
    save_file({n: v.contiguous() for n, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    settings: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    settings["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "expected.json").write_text(json.dumps(expected(model, tokenizer)))


class Served:
    """A directory that GenAI has loaded."""

    def __init__(self, folder: Path) -> None:
        import onnx
        import onnxruntime_genai as genai

        self.genai, self.model, self.name = genai, genai.Model(str(folder)), folder.name
        self.expected = json.loads((folder / "expected.json").read_text())
        nodes = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.node
        self.nodes = len(nodes)
        self.adapters = None
        for file in folder.glob("*.onnx_adapter"):
            self.adapters = genai.Adapters(self.model)
            self.adapters.load(str(file), "adapter")

    def generate(self, ids: list[int], steps: int, least: int = 0) -> tuple[float, float, list[int]]:
        """Seconds of the prompt and of the steps after its own first token, and the tokens.

        Args:
            ids: the prompt.
            steps: at most.
            least: of them before it may stop; the search forbids the end until then.
        """
        parameters = self.genai.GeneratorParams(self.model)
        length = len(ids) + steps + 1
        parameters.set_search_options(do_sample=False, max_length=length, min_length=len(ids) + least)
        generator = self.genai.Generator(self.model, parameters)
        if self.adapters is not None:
            generator.set_active_adapter(self.adapters, "adapter")
        start = time.perf_counter()
        generator.append_tokens(np.array(ids, np.int32))
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(steps):
            if generator.is_done():
                break
            generator.generate_next_token()
        return read - start, time.perf_counter() - read, [int(t) for t in generator.get_sequence(0)][len(ids) :]


def run(folder: Path, only: list[str]) -> None:
    """Tokens, then times in turn."""
    _, tokenizer = smollm.load()
    names = [p.name for p in sorted(folder.iterdir()) if (p / "genai_config.json").exists()]
    served = [Served(folder / n) for n in names if not only or n in only]
    rows: dict[str, dict[str, Any]] = {s.name: {"nodes": s.nodes} for s in served}
    for s in served:
        prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
        got = [s.generate(ids, COMPARED - 1)[2] for ids in prompts]
        rows[s.name]["tokens"] = sum(len(a) > 8 and a == b[: len(a)] for a, b in zip(got, s.expected, strict=True))
    ids = torch.randint(5, 49000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    times: dict[str, list[tuple[float, float]]] = {s.name: [] for s in served}
    for _ in range(ROUNDS + 1):  # the first is not counted
        for s in served:
            times[s.name].append(s.generate(ids, DECODED, DECODED + 1)[:2])
    for name, row in rows.items():
        for index, kind in enumerate(("prompt", "decode")):
            median = statistics.median(t[index] for t in times[name][1:])
            row[f"{kind}_tokens_a_second"] = (PROMPT, DECODED)[index] / median
    for name, row in rows.items():
        peer = rows.get(f"{name.partition('-')[0]}-builder")
        for kind in ("prompt", "decode"):
            if peer is not None:
                row[f"{kind}_ratio"] = peer[f"{kind}_tokens_a_second"] / row[f"{kind}_tokens_a_second"]
        print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
    result = {"prompt": PROMPT, "decoded": DECODED, "rounds": ROUNDS, "prompts": len(PROMPTS), "rows": rows}
    if not only:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("make", "gptq", "run"))
    parser.add_argument("--folder", type=Path, default=Path("oftfx-bench/genai"), help="directories")
    parser.add_argument("--only", nargs="*", default=[], help="directories to time; then no result is written")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.stage == "make":
        make(args.folder)
    elif args.stage == "gptq":
        gptq(args.folder)
    else:
        if find_spec("onnxruntime_genai") is None:
            sys.exit("onnxruntime_genai is not installed; pip install 'oftfx[genai]'")
        built(args.folder / "checkpoint-gptq", args.folder / "gptq-builder", "int4", **EXACT)
        run(args.folder, args.only)


if __name__ == "__main__":
    main()
