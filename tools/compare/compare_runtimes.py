"""SmolLM2-135M, folded, in runtimes that people serve or ship with: 32 greedy tokens of four prompts, against torch's.

    PYTHONPATH=. .venv-layers/bin/python tools/compare/compare_runtimes.py [--only NAME ...]

In .venv-layers of tools/environment-layers (OpenVINO, gptqmodel), with the packages for node of
tools/environment-serve. Writes tools/results/runtimes.json: for each prompt how many tokens are torch's on the same
weights before the first other one, and by how much torch's best was ahead of its second there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

import oftfx
from oftfx.adapter.checkpoints import quantized_layers
from oftfx.demo import smollm
from oftfx.formats.registry import format_of
from oftfx.model.structure import replace_module, structural_copy
from oftfx.onnx.openvino import EXACT
from tests.serving.node import node
from tools.bench.bench_genai import PROMPTS, rotated
from tools.bench.bench_vllm import COUNT, compared

RESULTS = Path(__file__).parents[1] / "results" / "runtimes.json"
Tokens = list[list[int]]


def folded(base: nn.Module, **how: Any) -> nn.Module:
    """With an adapter in its weights."""
    return oftfx.fold(rotated(base), **how).model


def in_gptq(base: nn.Module) -> nn.Module:
    """Every linear layer but the head in 4 bits, groups of 32, float16 scales, symmetric."""
    from oftfx.formats.gptq import make_gptq

    head = base.get_output_embeddings()  # type: ignore[operator]
    for module in list(base.modules()):
        if type(module) is nn.Linear and module is not head:
            replace_module(base, module, make_gptq(module, group_size=32))
    return base


def greedy(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """torch's tokens, by its cache, and by how much each was ahead of the second best."""
    given = torch.tensor([ids])
    settings = {"do_sample": False, "max_new_tokens": COUNT, "min_new_tokens": COUNT, "eos_token_id": None}
    more = {"attention_mask": torch.ones_like(given), "pad_token_id": 0, "output_logits": True}
    found = model.generate(given, **settings, **more, return_dict_in_generate=True)
    best = torch.cat(found.logits).float().topk(2).values
    return found.sequences[0, len(ids) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def in_floats(model: nn.Module) -> nn.Module:
    """The same weights, which torch need not read anew for each token."""
    made = structural_copy(model)
    for name, layer in quantized_layers(made).items():
        weight_format: Any = format_of(layer)
        made.set_submodule(name, weight_format.float_module(layer, weight_format.dequantize(layer)))
    return made.float()


def llama_cpp(model: nn.Module, tokenizer: Any, prompts: Tokens, folder: Path) -> Iterator[tuple[str, Tokens, str]]:
    """As it is, and in float16 and 8 bits; with llama.cpp's own cache and attention as well."""
    for kind in (None,) if quantized_layers(model) else (None, "F16", "Q8_0"):
        report = oftfx.export_gguf(model, folder / "m.gguf", tokenizer=tokenizer, quantized=kind)  # type: ignore[arg-type]
        name = f"llama.cpp, {max(report.types, key=lambda t: report.types[t] * (t != 'F32'))}"
        for defaults in (False, True):
            task = {"runs": {"m": str(report.path)}, "prompts": prompts, "count": COUNT, "defaults": defaults}
            note = f"{report.nbytes / 2**20:.0f} MiB; {str(report).splitlines()[1]}"
            yield name + (", its own settings" if defaults else ""), node("llama_cpp.mjs", folder, **task)["m"], note
        report.path.unlink()


def openvino_genai(
    model: nn.Module, tokenizer: Any, prompts: Tokens, folder: Path
) -> Iterator[tuple[str, Tokens, str]]:
    """The pipeline, exact and by its own settings."""
    import openvino
    import openvino_genai

    report = oftfx.export_openvino(model, folder / "openvino", tokenizer=tokenizer)
    for name, settings in (("OpenVINO GenAI", EXACT), ("OpenVINO GenAI, its own settings", {})):
        pipeline = openvino_genai.LLMPipeline(str(folder / "openvino"), "CPU", **settings)
        options = {"max_new_tokens": COUNT, "ignore_eos": True, "do_sample": False}
        got = [pipeline.generate(openvino.Tensor(np.array([p], np.int64)), **options).tokens[0] for p in prompts]
        yield name, got, f"{report.nbytes / 2**20:.0f} MiB"


def onnx_web(model: nn.Module, tokenizer: Any, prompts: Tokens, folder: Path) -> Iterator[tuple[str, Tokens, str]]:  # noqa: ARG001
    """An adapter's blocks as inputs of the wasm build."""
    report = oftfx.export_onnx(
        model, folder / "m.onnx", cache=True, adapters="inputs", dialect="standard", verify=False
    )
    file = oftfx.export_onnx_adapter(model, folder / "a.safetensors")
    config: Any = model.config
    head = config.hidden_size // config.num_attention_heads
    task = {"graph": str(report.path), "adapters": {"a": str(file)}, "prompts": prompts, "count": COUNT}
    got = node("onnx_web.mjs", folder, **task, heads=config.num_key_value_heads, head=head)["answers"]["a"]
    yield "ONNX Runtime Web, adapter as input", got, f"{report.nbytes / 2**20:.0f} MiB"


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Callable[..., Iterator[tuple[str, Tokens, str]]], ...]]] = {
    "float": (lambda: folded(smollm.load()[0]), (llama_cpp, openvino_genai)),
    "GPTQ 4-bit": (
        lambda: folded(in_gptq(smollm.load()[0]), quantized="requantize"),
        (llama_cpp, openvino_genai),
    ),
    "unfolded": (lambda: rotated(smollm.load()[0]), (onnx_web,)),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    tokenizer = smollm.load()[1]
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    for case in args.only:
        make, runtimes = CASES[case]
        model = make()
        floats = in_floats(model)
        expected = [greedy(floats, p) for p in prompts]
        for runtime in runtimes:
            with tempfile.TemporaryDirectory() as folder:
                for name, got, note in runtime(model, tokenizer, prompts, Path(folder)):
                    assert not isinstance(got, str), got
                    rows[f"{case}: {name}"] = {"prompts": compared([list(g) for g in got], expected), "note": note}
                    print(case, name, rows[f"{case}: {name}"], flush=True)
        RESULTS.write_text(json.dumps({"count": COUNT, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
