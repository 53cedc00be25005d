"""Checkpoint directories, and what a fold leaves in them."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file

import oftfx
from oftfx import OFT
from oftfx.adapter.folded import read_note
from oftfx.folding.checkpoint import checkpoint_digest
from oftfx.folding.report import FoldReport
from oftfx.formats import format_named
from oftfx.inspecting.inspect import inspect
from oftfx.streaming.directory import CheckpointDirectory
from tests.fuzz.bundle import parted, place, taken
from tests.fuzz.targets.base import Target, every

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAMES = (
    "config.json",
    "model.safetensors",
    INDEX,
    *SHARDS,
    "oftfx_fold.json",
    "oftfx_rotations.safetensors",
    "qmodel.pt",
)
WORDS = (
    "weight_map",
    "metadata",
    "architectures",
    "quantization_config",
    "quant_method",
    "bits",
    "group_size",
    *NAMES,
    "model.layers.0.weight",
    "F32",
    "BF16",
    "data_offsets",
    "shape",
    "dtype",
    "__metadata__",
)
NOTES = (
    "oftfx_fold",
    "way",
    "facts",
    "files",
    "checkpoint",
    "rotations",
    "folds",
    "report",
    "sites",
    "adapters",
    "measured",
    "provenance",
    "action",
    "survival",
    "relative_error",
    "fqn",
    "format",
    "state_dict",
    "hqq",
    "transformers",
    "module",
    "class",
    "floats",
    "quantized",
    "compute_dtype",
    "../outside/model.safetensors",
    "load",
    "pipeline",
    "0",
    "1",
    "oftfx_rotations",
    "keep",
    "folded",
    "four_bit",
    "quanto",
    "AutoTokenizer",
    "hub",
    "output_error",
    "perplexity_before",
)


def checkpoints(path: Path) -> list[bytes]:
    """In one file, and in two with an index."""
    one, two = path / "one", path / "two"
    one.mkdir(), two.mkdir()
    config = {
        "architectures": ["X"],
        "model_type": "x",
        "hidden_size": 4,
        "quantization_config": {"quant_method": "gptq", "bits": 4},
    }
    tensors = {"model.layers.0.weight": torch.ones(4, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    for directory in (one, two):
        (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, one / "model.safetensors", {"format": "pt"})
    for file, (name, tensor) in zip(SHARDS, tensors.items(), strict=True):
        save_file({name: tensor}, two / file)
    found = {"metadata": {"total_size": 54}, "weight_map": dict(zip(tensors, SHARDS, strict=True))}
    (two / INDEX).write_text(json.dumps(found))
    return [taken(one, NAMES), taken(two, NAMES)]


def read_checkpoint(data: bytes, path: Path) -> None:
    """By its headers, each of the ways."""
    place(data, path, NAMES)
    every(
        lambda: CheckpointDirectory.read(path).fingerprint(None),
        lambda: checkpoint_digest(path),
        lambda: str(inspect(path)).encode(),
        lambda: inspect(path).to_json(),
        lambda: [str(inspect(file)).encode() for file in sorted(path.glob("*.safetensors"))],
    )


@cache
def _bases() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4)), nn.Sequential(format_named("bnb8").make_tiny(66, 10))


def folds(path: Path) -> list[bytes]:
    """Of a float layer, and of a quantized one that kept its rotation."""
    plain, quantized = _bases()
    for name, base, how in (("a", plain, "keep"), ("b", quantized, "keep")):
        model = oftfx.transform(copy.deepcopy(base), {"*": OFT(3, init="normal")})
        result = oftfx.fold(model, quantized=how, calibration=[(torch.randn(5, base[0].in_features),)])
        result.save(path / name)
        (path / name / "config.json").write_text("{}")
    return [taken(path / name, NAMES) for name in "ab"]


def read_fold(data: bytes, path: Path) -> None:
    """Its note, its report, and the model with it."""
    place(data, path, NAMES)
    plain, quantized = _bases()
    text = parted(data).get("oftfx_fold.json", data).decode(errors="replace")

    def shown() -> None:
        report = FoldReport.from_json(text)
        (str(report) + report.table() + report.to_json() + report.to_markdown()).encode()

    def honest() -> None:
        """The digests made right, as one who wants to be believed does, so that what is behind them is reached."""
        found = json.loads(text) if len(text) < 50_000 else None
        if isinstance(found, dict):
            from oftfx.adapter.folded import file_sum

            found["checkpoint"] = checkpoint_digest(path)
            file = path / "oftfx_rotations.safetensors"
            found["rotations"] = file_sum(file) if file.is_file() else None
            (path / "oftfx_fold.json").write_text(json.dumps(found))

    every(
        lambda: read_note(path),
        shown,
        lambda: oftfx.load_rotations(copy.deepcopy(quantized), path),
        lambda: _tolerant(honest),
        lambda: str(inspect(path)).encode(),
        lambda: oftfx.load_folded(path, copy.deepcopy(plain)),
        lambda: oftfx.load_folded(path, copy.deepcopy(quantized)),
        lambda: oftfx.load_folded(path),
    )


def _tolerant(call) -> None:  # type: ignore[no-untyped-def]
    """What the harness itself does with broken JSON is no finding."""
    try:
        call()
    except (ValueError, RecursionError):
        return


CHECKPOINTS = Target("checkpoints", checkpoints, read_checkpoint, WORDS)
FOLDS = Target("folds", folds, read_fold, NOTES, ("bitsandbytes", "rich", "jinja2"))
