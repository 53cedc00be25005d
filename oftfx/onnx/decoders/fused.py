"""The call of a decoder whose attention is one operator: rows begin at the left, and their cache has no gaps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError
from oftfx.onnx.decoders.decoder import Decoder
from oftfx.onnx.decoders.fusion import Fusion, UnfusableError, find_fusion

OPERATOR = "GroupQueryAttention"


class FusedDecoder(Decoder):
    """As `Decoder`, for ``GroupQueryAttention``, which takes a row's tokens to be the first of its cache.

    Padding is on the right. In a later step it stands between a row's tokens in ``attention_mask``, whose ones are
    counted; in the cache the row's next token takes its place. Where the operator rotates there are no
    ``position_ids``. Rows of a batch read their prompts in one piece. A row that is padded on the left is an error of
    the runtime.

    Args:
        model: to be exported.
        given: names of the user's example inputs.
        fusion: how its attention becomes the operator.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Tensor], fusion: Fusion) -> None:
        self.fusion = fusion
        super().__init__(model, given)
        self.shapes = {n: axes for n, axes in self.shapes.items() if n in self.inputs}

    def stepped(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """In torch, the cache as the operator has it: without gaps."""
        mask = inputs["attention_mask"]
        exported = torch.onnx.is_in_onnx_export()
        given = dict(inputs)
        if self._takes_positions and "position_ids" not in given and not exported:
            given["position_ids"] = self._tokens(mask, mask)["position_ids"][:, -inputs["input_ids"].shape[1] :]
        step, found = super().stepped(model, given)
        if not exported:
            order = mask.sort(dim=1, descending=True, stable=True).indices[:, None, :, None]
            for name, value in found.items():
                if name.startswith("present."):
                    found[name] = value.gather(2, order.expand_as(value))
        return step, found

    def fresh(self, sizes: Mapping[str, int], seed: int, *, padded: bool = True) -> dict[str, Tensor]:
        """Without positions where the operator has them."""
        found = super().fresh(sizes, seed, padded=padded)
        return {n: v for n, v in found.items() if n != "position_ids" or not self.fusion.rotary}

    def mask(self, sizes: Mapping[str, int]) -> Tensor:
        """Padded on the right of the prompt: of this one, or of the one before this step."""
        batch, sequence, past = (sizes[n] for n in ("batch", "sequence", "past_sequence"))
        prompt = past or sequence
        lengths = prompt - torch.arange(batch)[:, None].mul(2).clamp(max=prompt - 1)
        places = torch.arange(past + sequence)[None]
        return ((places < lengths) | (places >= prompt)).long()

    def sizes(self) -> list[dict[str, int]]:
        """A prompt, a step of rows of several lengths, a part of a prompt after another, and a prompt of one token."""
        lengths = ((3, 6, 0), (3, 1, 7), (1, 3, 5), (1, 1, 0))
        return [{"batch": b, "sequence": s, "past_sequence": p} for b, s, p in lengths]

    def comparable(self, name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """With zeros behind the tokens of each row."""
        if name.startswith("present."):
            count = inputs["attention_mask"].sum(1)
            behind = torch.arange(value.shape[2], device=count.device)[None] >= count[:, None]
            return value.masked_fill(behind[:, None, :, None].to(value.device), 0)
        return super().comparable(name, value, inputs)


def decoder_of(model: nn.Module, given: Mapping[str, Tensor], fused: bool | None, dialect: str) -> tuple[Decoder, str]:
    """The signature of a decoder's graph, and what becomes of its attention; see `oftfx.export_onnx`.

    Raises:
        ExportError: it was to be fused and cannot be, or the model is no decoder.
    """
    plain = Decoder(model, given)
    if fused is False:
        return plain, ""
    try:
        if dialect != "ort":
            raise UnfusableError(f"dialect {dialect!r} has no such operator")
        return FusedDecoder(model, given, find_fusion(model, plain)), OPERATOR
    except UnfusableError as error:
        if fused:
            raise ExportError(
                f"{type(model).__name__}: its attention is not what {OPERATOR} computes: {error}. Export it with "
                "fused=False"
            ) from None
        return plain, f"in plain operators: {error}"
