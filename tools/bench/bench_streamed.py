"""Calibrate SmolLM2 in NF4 from files to files, beside the same fold in memory: seconds, memory, and the same bytes.

    PYTHONPATH=. .venv/bin/python tools/bench/bench_streamed.py [--tokens 8192] [--adapter DIR] [--folder DIR]

Three processes one after the other: `oftfx fold` with the hidden states in memory, the same with them on the disk, and
`oftfx.fold` of a model that is loaded. Memory is the peak of the process (VmHWM, so pages of files that are mapped
count) over what it had when oftfx, torch, transformers and bitsandbytes were imported. The adapter is a random one
unless one is given: neither time nor memory depends on its numbers. Writes tools/results/streamed.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import oftfx
from oftfx.demo import smollm, text

RESULTS = Path(__file__).parents[1] / "results" / "streamed.json"
LENGTH = 128
RUN = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import bitsandbytes, torch, transformers, oftfx
from transformers.models.llama import modeling_llama
def memory(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
before, began = memory("VmRSS"), time.perf_counter()
base, adapter, out, texts, tokens, length, place = sys.argv[1:]
if place == "model":
    from pathlib import Path
    from oftfx.streaming.texts import calibration_from
    inputs = calibration_from(Path(base), Path(texts), int(tokens), int(length))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = oftfx.load_adapter(model, adapter)
    oftfx.fold(model, quantized="calibrate", calibration=inputs, inplace=True).save(out)
else:
    from oftfx.cli.main import main
    sys.argv = ["oftfx", "fold", base, adapter, out, "--quantized", "calibrate", "--calibration", texts, "--tokens",
                tokens, "--sequence", length, "--hidden-states", place, "--json"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
print("\\nFOUND", json.dumps({"seconds": time.perf_counter() - began, "bytes": memory("VmHWM") - before}))
"""


def make(folder: Path, adapter: Path | None) -> Path:
    """A base in NF4 with its tokenizer, texts, and an adapter; gives the adapter's directory."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model, tokenizer = smollm.load()
    model.save_pretrained(folder / "float")
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    options: dict[str, Any] = {"dtype": torch.float32, "device_map": {"": "cpu"}}
    quantized = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=four, **options)
    quantized.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = (json.dumps({"text": article}) for article in text.read("train"))
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if adapter is not None:
        return adapter
    torch.manual_seed(0)
    rotated = oftfx.transform(quantized, {"all-linear": oftfx.OFT(32)})
    with torch.no_grad():
        for parameter in oftfx.adapter_parameters(rotated):
            parameter.normal_(std=0.01)
    return Path(oftfx.save_adapter(rotated, folder / "adapter"))


def digest(directory: Path) -> str:
    """Of all tensors of a checkpoint."""
    found = hashlib.sha256()
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                found.update(name.encode())
                found.update(opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Command line."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--tokens", type=int, default=8192)
    asked.add_argument("--adapter", type=Path)
    asked.add_argument("--folder", type=Path)
    options = asked.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        adapter = make(folder, options.adapter)
        rows: dict[str, Any] = {}
        sums = {}
        for place in ("memory", "disk", "model"):
            parts = [str(p) for p in (folder / "base", adapter, folder / place, folder / "texts.jsonl")]
            command = [sys.executable, "-c", RUN, *parts, str(options.tokens), str(LENGTH), place]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{place}: {done.stderr[-2000:]}")
            rows[place] = json.loads(done.stdout.rpartition("FOUND ")[2])
            sums[place] = digest(folder / place)
            sys.stderr.write(f"{place}: {rows[place]}\n")
    same = len(set(sums.values())) == 1
    found = {"tokens": options.tokens, "threads": torch.get_num_threads(), "same bytes": same, "rows": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if not same:
        raise SystemExit(f"the bytes differ: {sums}")


if __name__ == "__main__":
    main()
