"""Whether a decoder's attention is what ``GroupQueryAttention`` computes: tried in torch, not guessed from names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.model.running import evaluating
from oftfx.model.structure import replace_module, structural_copy
from oftfx.onnx.decoders.decoder import Decoder
from oftfx.precision import BOUNDS, relative_error

_TRIED = {"batch": 2, "sequence": 5, "past_sequence": 4}
_CHANGING = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose angles depend on the length."""


class UnfusableError(Exception):
    """Attention that is another function; the message says which."""


@dataclass(frozen=True)
class Fusion:
    """How a model's attention becomes the operator.

    Attributes:
        rotary: path of the model's rotary embedding, if the operator rotates.
        cos, sin: its tables ``(positions, rotated / 2)``.
    """

    rotary: str = ""
    cos: Tensor | None = None
    sin: Tensor | None = None

    def install(self, model: nn.Module) -> None:
        """Change a copy of the model, whose config has to be its own."""
        from oftfx.onnx.fused.attention import NAME, FusedRotary, register

        register()
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            if hasattr(config, "_attn_implementation"):
                config._attn_implementation = NAME
        if self.cos is not None and self.sin is not None:
            replace_module(model, model.get_submodule(self.rotary), FusedRotary(self.cos, self.sin))


@torch.no_grad()
def find_fusion(model: nn.Module, signature: Decoder) -> Fusion:
    """How the attention of ``model`` becomes the operator: with its rotation, or without.

    The operator's function is put in its place in torch, and has to give what the model gives.

    Args:
        model: the model.
        signature: how it is called.

    Raises:
        UnfusableError: it is another function.
    """
    kinds = {v.dtype for n, v in signature.inputs.items() if n.startswith("past_key_values.")}
    if not kinds <= {torch.float32, torch.float16}:
        raise UnfusableError("the operator is for float32 and float16")
    sizes = {shape for pair in signature.layers for shape in pair}
    if any(keys != values for keys, values in signature.layers) or any(head % 8 for _, head in sizes):
        raise UnfusableError("the operator is for keys and values of one size that is a multiple of 8")
    inputs = signature.fresh(_TRIED, 0, padded=False)
    with evaluating(model):
        wanted = signature.run(model, inputs)
    reason = ""
    for fusion in [f for f in (_rotating(model), Fusion()) if f is not None]:
        copied = structural_copy(model).eval()
        fusion.install(copied)
        reason = _difference(copied, signature, inputs, wanted)
        if not reason:
            return fusion
    raise UnfusableError(reason)


def _rotating(model: nn.Module) -> Fusion | None:
    """With the tables of the model's rotary embedding; None where it has none, several, or one of another kind."""
    found = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("RotaryEmbedding")]
    config: Any = model.config
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if len(found) != 1 or not positions:
        return None
    path, rotary = found[0]
    if getattr(rotary, "rope_type", "") in _CHANGING:
        raise UnfusableError(f"its rotary embedding ({rotary.rope_type}) depends on the length")
    weight = next(p for p in model.parameters() if p.is_floating_point())
    x = torch.zeros(1, 1, 1, dtype=torch.float32, device=weight.device)
    try:
        cos, sin = structural_copy(rotary)(x, torch.arange(positions, device=weight.device)[None])
    except (TypeError, ValueError, AttributeError):
        return None
    half = cos.shape[-1] // 2
    plain = all(
        t.dim() == 3 and t.shape[-1] % 16 == 0 and torch.equal(t[..., :half], t[..., half:]) for t in (cos, sin)
    )
    if not plain:
        return None
    return Fusion(path, *(t[0, :, :half].to(weight.dtype).contiguous() for t in (cos, sin)))


def _difference(model: nn.Module, signature: Decoder, inputs: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """Why the changed model is another function; empty where it is the same."""
    try:
        step, got = signature.stepped(model, inputs)
    except Exception as error:  # of any code of a model that meets what it does not know
        return f"its code does not take another attention: {type(error).__name__}: {error}"
    if step.refused:
        return step.refused[0]
    if missing := sorted(set(range(len(signature.layers))) - step.fused):
        return f"layer {missing[0]} does not attend through transformers' interface"
    for name, value in wanted.items():
        if not relative_error(got[name], value) <= BOUNDS.get(value.dtype, 0.0):
            return f"it gives other {name}"
    return ""
