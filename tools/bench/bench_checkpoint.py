"""Fold synthetic checkpoints from files to files: memory, and throughput beside `cp` in the same run.

    python tools/bench/bench_checkpoint.py [--gigabytes 6] [--rounds 3] [--folder DIR] [--cases dense,gptq-keep,...]

Makes a dense bfloat16 checkpoint and a GPTQ one in 4 bits (needs gptqmodel and optimum) with the layers of Llama 2 7B,
as many as fill the size, in shards of 2 GB. Each case runs `cp -r` and the fold by turns, both followed by `sync`, in
processes of their own; the kernel's memory of the peak (VmHWM) is read off the fold's, less that of an interpreter
that has imported oftfx, torch and transformers and read the configuration. Writes tools/results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, WIDE, VOCABULARY, GROUP, SHARD = 4096, 11008, 32000, 128, 2 * 2**30
LAYER = {
    **{f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"},
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
CASES = {
    "dense": ("dense", None),
    "gptq-keep": ("gptq", "keep"),
    "gptq-requantize": ("gptq", "requantize"),
}
FOLD = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import oftfx, torch, transformers
from oftfx.streaming import directory_fold, skeleton, job
transformers.AutoConfig.from_pretrained(sys.argv[1])
def peak(what="VmHWM"):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(what))
before = peak("VmRSS")
began = time.perf_counter()
checked = []
report = oftfx.fold_checkpoint(*sys.argv[1:4], quantized=sys.argv[4] or None,
    progress=lambda done, total: checked or checked.append(time.perf_counter() - began))
seconds, actions = time.perf_counter() - began, sorted({s.action for s in report})
print(json.dumps({"seconds": seconds, "before": before, "peak": peak(), "actions": actions, "checks": checked[0]}))
"""


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--gigabytes", type=float, default=6)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--folder", type=Path, default=ROOT / "oftfx-bench/checkpoint")
    asked.add_argument("--cases", default=",".join(CASES))
    asked.add_argument("--out", type=Path, default=ROOT / "tools/results/checkpoint.json")
    options = asked.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for case in options.cases.split(","):
        kind, policy = CASES[case]
        base, adapter = options.folder / kind, options.folder / f"{kind}-adapter"
        if not (base / "config.json").exists():
            shutil.rmtree(base, ignore_errors=True)
            make(base, adapter, kind, options.gigabytes * 1e9)
        results[case] = measure(base, adapter, policy, options)
        print(case, json.dumps(results[case], indent=1))
    made = {
        "gigabytes": options.gigabytes, "rounds": options.rounds, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "machine": platform.machine(), "cases": results,
    }  # fmt: skip
    options.out.write_text(json.dumps(made, indent=1) + "\n")


def measure(base: Path, adapter: Path, policy: str | None, options: argparse.Namespace) -> dict:
    """Both, by turns."""
    size = sum(p.stat().st_size for p in base.iterdir())
    copies, folds, checks, peaks, actions = [], [], [], [], []
    for _ in range(options.rounds):
        out = options.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(["sync"], check=True)
        began = time.perf_counter()
        subprocess.run(["cp", "-r", base, out], check=True)
        subprocess.run(["sync"], check=True)
        copies.append(time.perf_counter() - began)
        shutil.rmtree(out)
        subprocess.run(["sync"], check=True)
        command = [sys.executable, "-c", FOLD, base, adapter, out, policy or ""]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        said = json.loads(done.stdout.splitlines()[-1])
        folds.append(said["seconds"])
        checks.append(said["checks"])
        peaks.append(said["peak"] - said["before"])
        actions = said["actions"]
        shutil.rmtree(out)
    slow, fast = statistics.median(folds), statistics.median(copies)
    return {
        "bytes": size, "actions": actions, "cp_seconds": [round(s, 2) for s in copies],
        "fold_seconds": [round(s, 2) for s in folds], "fold_mb_per_second": round(size / slow / 1e6),
        "cp_mb_per_second": round(size / fast / 1e6), "share_of_cp": round(fast / slow, 3),
        "check_seconds": round(statistics.median(checks), 2), "peak_mb_over_interpreter": round(max(peaks) / 1e6),
    }  # fmt: skip


def make(base: Path, adapter: Path, kind: str, size: float) -> None:
    """A checkpoint and an adapter for all its layers; numbers are random, of the right size."""
    base.mkdir()
    each = sum(rows * columns for rows, columns in LAYER.values()) * (2 if kind == "dense" else 0.5 + 4.5 / GROUP)
    layers = max(1, round((size - 4 * VOCABULARY * HIDDEN) / each))
    writer = _Shards(base)
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        writer.add({name: torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(0.02).bfloat16()})
    writer.add({"model.norm.weight": torch.ones(HIDDEN).bfloat16()})
    skews = {}
    for index in range(layers):
        path = f"model.layers.{index}"
        norms = ("input_layernorm", "post_attention_layernorm")
        writer.add({f"{path}.{n}.weight": torch.ones(HIDDEN).bfloat16() for n in norms})
        for name, (rows, columns) in LAYER.items():
            tensors = dense(rows, columns, generator) if kind == "dense" else gptq(rows, columns, generator)
            writer.add({f"{path}.{name}.{n}": t for n, t in tensors.items()})
            skew = torch.randn(columns // 32, 32 * 31 // 2, generator=generator).mul_(0.01)
            skews[f"base_model.model.{path}.{name}.oft_R.weight"] = skew
    writer.end()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": WIDE, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": VOCABULARY, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    if kind == "gptq":
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False,
            "checkpoint_format": "gptq_v2",
        }  # fmt: skip
    adapter.mkdir(exist_ok=True)
    save_file(skews, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {
        "peft_type": "OFT", "peft_version": "0.21.2", "target_modules": sorted(n.split(".")[1] for n in LAYER),
        "oft_block_size": 32, "r": 0, "bias": "none", "use_cayley_neumann": True, "num_cayley_neumann_terms": 5,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    (base / "config.json").write_text(json.dumps(config, indent=1))


def dense(rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(rows, columns, generator=generator).mul_(0.02).bfloat16()}


def gptq(rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).int()

    groups = columns // GROUP
    return {
        "qweight": words(columns // 8, rows),
        "qzeros": torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32),
        "scales": (torch.rand(groups, rows, generator=generator) * 0.004 + 0.004).half(),
        "g_idx": (torch.arange(columns) // GROUP).int(),
    }


class _Shards:
    """Writes tensors into files of some size, and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.tensors, self.where = folder, 0, {}, {}

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors |= tensors
        if sum(t.nbytes for t in self.tensors.values()) > SHARD:
            self._write()

    def end(self) -> None:
        self._write()
        index = {"metadata": {"total_size": 0}, "weight_map": self.where}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def _write(self) -> None:
        self.files += 1
        name = f"model-{self.files:05d}.safetensors"
        save_file(self.tensors, self.folder / name, metadata={"format": "pt"})
        self.where |= dict.fromkeys(self.tensors, name)
        self.tensors = {}


if __name__ == "__main__":
    main()
