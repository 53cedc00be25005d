"""Which models of transformers llama.cpp computes as they are, and what it has to be told of each.

A class is here only with what its program in llama.cpp reads; what it does not read is refused, not left out.
Source: the metadata keys of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the behaviour of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError

Metadata = dict[str, Any]
_Fault = str | None


@dataclass(frozen=True)
class Family:
    """How models of one class become a file.

    Attributes:
        arch: llama.cpp's name of the architecture.
        pairs: whether llama.cpp rotates neighbouring channels of queries and keys, where transformers rotates those
            half a head apart; the rows of their weights are reordered then.
        shifted: whether norms multiply by ``1 + weight`` in transformers; llama.cpp multiplies by what is stored.
        head: whether llama.cpp reads a head of its own.
        activation: the config's, which llama.cpp has fixed.
        frequencies: whether llama.cpp reads a factor for each angle.
        fault: what else of a config llama.cpp does not compute.
        more: metadata besides what all have, by key without the architecture.
    """

    arch: str
    pairs: bool = False
    shifted: bool = False
    head: bool = True
    activation: str = "silu"
    frequencies: bool = False
    fault: Callable[[Any], _Fault] = lambda _: None
    more: Callable[[Any], Metadata] = lambda _: {}


def _full_attention(config: Any) -> _Fault:
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings and getattr(config, "use_sliding_window", True):
        return f"sliding_window={window}; set it to None for texts that are not longer"
    if getattr(config, "attention_bias", False) and config.model_type != "llama":
        return "attention_bias=True"
    return None


def _gemma2(config: Any) -> _Fault:
    if config.query_pre_attn_scalar != config.head_dim:
        return f"query_pre_attn_scalar={config.query_pre_attn_scalar} with head_dim={config.head_dim}"
    expected = ["full_attention" if i % 2 else "sliding_attention" for i in range(config.num_hidden_layers)]
    if list(config.layer_types) != expected:
        return "layer_types that do not alternate, the first one sliding"
    return "attention_bias=True" if config.attention_bias else None


def _phi3(config: Any) -> _Fault:
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        return f"sliding_window={window}; set it to None for texts that are not longer"
    return None


def _capped(config: Any) -> Metadata:
    caps = {"attn_logit_softcapping": config.attn_logit_softcapping}
    caps["final_logit_softcapping"] = config.final_logit_softcapping
    # llama.cpp has values of its own for those that are not there.
    return {n: float(v or 0.0) for n, v in caps.items()} | {"attention.sliding_window": config.sliding_window}


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", pairs=True, frequencies=True, fault=_full_attention),
    "MistralForCausalLM": Family("llama", pairs=True, frequencies=True, fault=_full_attention),
    "Qwen2ForCausalLM": Family("qwen2", fault=_full_attention),
    "Qwen3ForCausalLM": Family("qwen3", fault=_full_attention),
    "GemmaForCausalLM": Family(
        "gemma", shifted=True, head=False, activation="gelu_pytorch_tanh", fault=_full_attention
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2", shifted=True, head=False, activation="gelu_pytorch_tanh", fault=_gemma2, more=_capped
    ),
    "Phi3ForCausalLM": Family("phi3", fault=_phi3),
}
"""By the name of the class."""


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        ExportError: its class is not known, or its config asks for what llama.cpp does not compute there.
    """
    kind = type(model).__name__
    family = FAMILIES.get(kind)
    if family is None or not type(model).__module__.startswith("transformers."):
        raise ExportError(
            f"no GGUF of a {kind}: known are {', '.join(FAMILIES)} of transformers. Save the checkpoint and convert it "
            "with llama.cpp's own convert_hf_to_gguf.py"
        )
    config: Any = model.config
    found = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    fault = family.fault(config)
    if found != family.activation:
        fault = f"activation {found!r}, where it has {family.activation!r}"
    kind_of_angle = config.rope_parameters.get("rope_type", "default")
    if kind_of_angle not in ("default", "linear") and not (kind_of_angle == "llama3" and family.frequencies):
        fault = f"rope_type={kind_of_angle!r}"
    if fault is not None:
        raise ExportError(f"no GGUF of this {kind}: llama.cpp's {family.arch!r} does not compute {fault}")
    return family


def head_size(config: Any) -> int:
    """Channels of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def metadata(family: Family, config: Any) -> Metadata:
    """What llama.cpp has to know of the architecture, by its keys."""
    head, rope = head_size(config), config.rope_parameters
    found: Metadata = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        **family.more(config),
    }
    if rope.get("rope_type") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return {f"{family.arch}.{key}": value for key, value in found.items()}


def angle_factors(model: nn.Module) -> Tensor | None:
    """By what each angle is divided, ``(head / 2,)``; None where none is.

    Raises:
        ExportError: the model's angles are scaled in a way that its config does not say.
    """
    config: Any = model.config
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    angles, scaling = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if scaling != 1:
        raise ExportError(f"no GGUF of this {type(model).__name__}: its rotary embedding is scaled by {scaling}")
    exponents = torch.arange(0, head_size(config), 2, dtype=torch.float32) / head_size(config)
    return 1.0 / (rope["rope_theta"] ** exponents) / angles


def reordered(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys ``(heads * head, ...)`` from halves of a head to neighbouring pairs."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
