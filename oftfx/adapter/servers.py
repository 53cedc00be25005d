"""What a server reads of folded checkpoints, checked before one is written. Facts: runs of vLLM 0.32 on a CPU."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from oftfx.adapter.checkpoints import Transformers, quantized_layers
from oftfx.adapter.gptq_state import as_published
from oftfx.adapter.integer_layers import integers_of
from oftfx.errors import FoldError
from oftfx.placement.find import rotated_sites

_READ = ("gptq", "awq", "compressed-tensors", "fp8")
_PACKED = "save_as='compressed-tensors' (or 'awq') writes the same weights in a form that it reads"
_ANEW = "it reads folds to floats (quantized='float'), and of quantized bases GPTQ, AWQ and compressed-tensors"


def check_server(model: nn.Module, server: str, save_as: str | None) -> None:
    """Raise `FoldError` where a server would not serve what is about to be written."""
    if server != "vllm":
        raise FoldError(f"server={server!r}; known: 'vllm'")
    fault = _fault(model, save_as)
    if fault is not None:
        raise FoldError(f"vLLM would not serve this {type(model).__name__}: {fault}")


def _fault(model: nn.Module, save_as: str | None) -> str | None:
    if not Transformers.takes(model):
        return "it is no model of transformers"
    kept = next((fqn for fqn, placement in rotated_sites(model) if placement.fixed), None)
    if kept is not None and save_as != "compressed-tensors":
        return (
            f"{kept} has a rotation in front of it, which it does not know. save_as='compressed-tensors' writes "
            "weights and rotations in a form that it serves; or serve base and adapter with the plugin (see the guide "
            "on vLLM), or fold with another policy than 'keep'"
        )
    layers = quantized_layers(model)
    if save_as == "gptq":
        uneven = next((p for p, m in layers.items() if not integers_of(p, m, "GPTQ").symmetric), None)
        return None if uneven is None else f"{uneven} has zero points, and it refuses asymmetric GPTQ; {_PACKED}"
    if save_as is not None or not layers:
        return None
    published: Any = as_published(model)
    said: Any = getattr(published.config, "quantization_config", None)
    facts = said if isinstance(said, dict) else {} if said is None else said.to_dict()
    method = str(getattr(facts.get("quant_method"), "value", facts.get("quant_method")))
    if method not in _READ:
        return f"it does not read {method}; {_ANEW}"
    if method == "gptq" and facts.get("desc_act"):
        return f"it refuses act-order; {_ANEW}"
    if method == "gptq" and not facts.get("sym"):
        return f"it refuses asymmetric GPTQ; {_PACKED}"
    return None
