"""A language model that decodes: its cache goes in and comes out as flat tensors, so one graph prefills and decodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError
from oftfx.model.running import evaluating
from oftfx.onnx.inputs import flat_outputs
from oftfx.onnx.signature import Signature

PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
"""Names of the cache's tensors in the graph, in and out, for a layer and ``key`` or ``value``."""

CACHE = ("cache", "past_key_values")
"""Names of the cache in a model's forward and in its result: since transformers 5.24, and before."""

# All lengths of the example differ from each other and from one: an equal pair could become one length in the graph.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


class Decoder(Signature):
    """The call of a causal language model of transformers with its cache.

    Inputs: ``input_ids (batch, sequence)``, ``attention_mask (batch, past_sequence + sequence)``, ``position_ids
    (batch, sequence)`` where the model takes them, all int64; for each layer ``past_key_values.{i}.key`` and ``.value
    (batch, heads, past_sequence, head)`` in the model's dtype. Outputs: ``logits (batch, sequence, vocabulary)``,
    ``present.{i}.key`` and ``.value (batch, heads, past_sequence + sequence, head)``, which are the next step's past.
    ``past_sequence`` is 0 for the prompt. Padding is on the left; what stands at padded positions means nothing.

    Layers with a sliding window keep their whole past here, and the mask keeps to the window.

    Args:
        model: to be exported.
        given: names of the user's example inputs.

    Attributes:
        layers: for each layer the shapes ``(heads, head)`` of its keys and values.

    Raises:
        ExportError: the model has no cache, or one of another kind.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Tensor]) -> None:
        parameters = _parameters(model)
        tokens = [n for n in ("input_ids", "attention_mask", "position_ids") if n in parameters]
        if unknown := [n for n in given if n not in tokens]:
            raise ExportError(
                f"cache=True: got the example input {unknown[0]!r}; a decoder's graph takes {', '.join(tokens)} and "
                "the cache. Leave it out"
            )
        self._model, self._takes_positions = model, "position_ids" in tokens
        self._cache = cache_name(parameters)
        device = next((v.device for v in given.values()), next(model.parameters()).device)
        keys = _cached(model, device)
        self.layers = tuple(tuple((t.shape[1], t.shape[3]) for t in pair) for pair in keys)
        self._dtype, self._device = keys[0][0].dtype, device
        shapes: dict[str, dict[int, str]] = {
            n: {0: "batch", 1: "total_sequence" if n == "attention_mask" else "sequence"} for n in tokens
        }
        shapes |= {n: {0: "batch", 2: "past_sequence"} for n, _ in self._past()}
        config: Any = model.config
        super().__init__({}, shapes, config.get_text_config(decoder=True).vocab_size)
        self.inputs = self.fresh({"batch": _BATCH, "sequence": _SEQUENCE, "past_sequence": _PAST}, 0, padded=False)

    def run(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Call the model with a cache of the past; its results and the cache by their names."""
        return self.stepped(model, inputs)[1]

    def stepped(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Also the `oftfx.onnx.fused.past.Step` that it was."""
        from transformers import DynamicCache

        from oftfx.onnx.fused.past import STEP, PastLayer, Step

        cache = DynamicCache()
        for index in range(len(self.layers)):
            cache.layers.append(PastLayer(*(inputs[PAST.format(index, kind)] for kind in ("key", "value"))))
        tokens = {n: v for n, v in inputs.items() if not n.startswith("past_key_values.")}
        step = Step(cache, inputs["attention_mask"])
        token = STEP.set(step)
        try:
            result = model(**tokens, **{self._cache: cache}, use_cache=True, return_dict=True)
        finally:
            STEP.reset(token)
        cache, others = _parted(result)
        found = dict(flat_outputs(others, tuple(inputs)))
        for index, layer in enumerate(cache.layers):
            found[PRESENT.format(index, "key")], found[PRESENT.format(index, "value")] = layer.keys, layer.values
        return step, found

    def fresh(self, sizes: Mapping[str, int], seed: int, *, padded: bool = True) -> dict[str, Tensor]:
        """Random tokens, and the model's own cache of random tokens before; each row is padded by two more.

        A cache of random numbers is like none that the model ever saw, and makes much of rounding: SmolLM2-135M's own
        float32 logits are a relative 1e-5 off its float64 logits there, and 7e-7 with a cache of its own.
        """
        generator = torch.Generator().manual_seed(seed)
        batch, sequence, past = (sizes[n] for n in ("batch", "sequence", "past_sequence"))
        total = past + sequence
        ids = torch.randint(self.vocabulary or 2, (batch, total), generator=generator).to(self._device)
        mask = (self.mask(sizes) if padded else torch.ones(batch, total, dtype=torch.long)).to(self._device)
        whole = self._tokens(ids, mask)
        cache = {n: torch.zeros(batch, heads, 0, head, dtype=self._dtype) for n, (heads, head) in self._past()}
        cache = {n: v.to(self._device) for n, v in cache.items()}
        if past:
            before = {n: v[:, :past].contiguous() for n, v in whole.items()}
            with torch.no_grad(), evaluating(self._model):
                found = self.run(self._model, {**before, **cache})
            cache = {
                n: self.comparable("present.", found[p], before) for n, p in zip(cache, self._present(), strict=True)
            }
        return {n: v if n == "attention_mask" else v[:, past:].contiguous() for n, v in whole.items()} | cache

    def mask(self, sizes: Mapping[str, int]) -> Tensor:
        """``attention_mask`` of rows of several lengths."""
        total = sizes["past_sequence"] + sizes["sequence"]
        padding = torch.arange(sizes["batch"])[:, None].mul(2).clamp(max=total - 1)
        return (torch.arange(total)[None] >= padding).long()

    def sizes(self) -> list[dict[str, int]]:
        """A prompt, a step, a part of a prompt after another part, and a prompt of one token."""
        lengths = ((3, 6, 0), (1, 1, 7), (3, 3, 5), (1, 1, 0))
        return [{"batch": b, "sequence": s, "past_sequence": p} for b, s, p in lengths]

    def comparable(self, name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """With zeros at padded positions: rows of a softmax in which all is masked are nobody's result."""
        real = inputs["attention_mask"].bool()
        batch, sequence = inputs["input_ids"].shape
        if name.startswith("present."):
            return value.masked_fill(~real[:, None, :, None].to(value.device), 0)
        if value.dim() > 2 and value.shape[:2] == (batch, sequence):
            shown = real[:, -sequence:].reshape(batch, sequence, *[1] * (value.dim() - 2))
            return value.masked_fill(~shown.to(value.device), 0)
        return value

    def _tokens(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        tokens = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            tokens["position_ids"] = mask.cumsum(1).sub(1).clamp(min=0)
        return tokens

    def _present(self) -> list[str]:
        return [PRESENT.format(index, kind) for index in range(len(self.layers)) for kind in ("key", "value")]

    def _past(self) -> list[tuple[str, tuple[int, int]]]:
        return [
            (PAST.format(index, kind), shape)
            for index, pair in enumerate(self.layers)
            for kind, shape in zip(("key", "value"), pair, strict=True)
        ]


def cache_name(names: Collection[str]) -> str:
    """What the cache is called among the names of a forward's arguments, or of a result; empty where none is it."""
    return next((n for n in CACHE if n in names), "")


def _parameters(model: nn.Module) -> Mapping[str, Any]:
    """Of the model's forward, which has to be a decoder's."""
    kind, config = type(model).__name__, getattr(model, "config", None)
    parameters = inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"{kind} is an encoder with a decoder, whose cache also holds the encoder's states; cache=True is for "
            "decoders alone. Export it without cache"
        )
    needed = (("input_ids",), ("attention_mask",), CACHE, ("use_cache",))
    missing = next((" or ".join(names) for names in needed if not parameters.keys() & names), None)
    if config is None or missing:
        lacks = "has no transformers config" if config is None else f"does not take {missing}"
        raise ExportError(
            f"{kind} has no cache: it {lacks}; cache=True is for causal language models of transformers. Export it "
            "without cache"
        )
    return parameters


def _parted(result: Any) -> tuple[Any, dict[str, Any]]:
    """The cache of a model's result, or None, and what else is in it.

    The result's class is the installed transformers', while a forward of the model's own code keeps its own name.
    """
    others = dict(result.items()) if isinstance(result, Mapping) else {}
    return others.pop(cache_name(others), None), others


@torch.no_grad()
def _cached(model: nn.Module, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of all layers after a step; their shapes are not in every config under the same names."""
    kind = type(model).__name__
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    with evaluating(model):
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, return_dict=True)
    cache, _ = _parted(result)
    if cache is None:
        raise ExportError(f"{kind} returns no cache; as it is configured it is no decoder. Export it without cache")
    config: Any = model.config
    types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer") or "chunked_attention" in types:
            name = "chunked attention" if "chunked_attention" in types else type(layer).__name__
            raise ExportError(
                f"{kind}: layer {index} has a cache of another kind ({name}); only keys and values of full or sliding "
                "attention can be inputs and outputs here. Export it without cache"
            )
    pairs = [(layer.keys, layer.values) for layer in getattr(cache, "layers", ())]
    if not pairs or any(k is None or k.dim() != 4 for k, _ in pairs):
        raise ExportError(
            f"{kind} has a cache ({type(cache).__name__}) without keys and values. Export it without cache"
        )
    return pairs
