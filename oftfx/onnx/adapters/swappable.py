"""Blocks as inputs of the graph, so that one session serves many adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError
from oftfx.model.index import ModelIndex
from oftfx.onnx.adapters.base import AdapterMode, Case
from oftfx.onnx.adapters.blocks import Slots, adapter_blocks, identity_like
from oftfx.onnx.signature import Signature
from oftfx.placement.find import rotated_sites
from oftfx.rotation.cayley import cayley
from oftfx.rotation.skew import skew_size
from oftfx.serving.copied.runtime.contract import ROTATIONS


class Swappable(AdapterMode):
    """Blocks as inputs: with the identity as default (``"swappable"``), or required (``"inputs"``).

    A runtime that honours defaults (ONNX Runtime) computes the base model unless an adapter is given. One that makes
    constants of them (OpenVINO) would compute the base whatever it is given, so there they have to be required.
    """

    slots: Slots

    def __init__(self, model: nn.Module, name: str = "swappable") -> None:
        super().__init__(model, name)
        active = only_active(self)
        self.slots = Slots.of(model, active)
        self.blocks = adapter_blocks(model, active, self.slots)
        self._buffers: Mapping[str, str] = {}

    def prepared(self, lowered: nn.Module) -> Swappable:
        """The mode that knows which buffer of the model is which input."""
        index, buffers = ModelIndex(lowered), dict[str, str]()
        for fqn, placement in rotated_sites(index):
            (frozen,) = placement.fixed
            buffers[self.slots.names[fqn]] = f"{index.path(frozen)}.blocks"
        result = copy.copy(self)
        result._buffers = buffers
        return result

    def inputs(self, signature: Signature) -> dict[str, Tensor]:  # noqa: ARG002
        """Blocks ``(blocks, b, b)`` by name."""
        return {n: self.blocks[n] for n in self._buffers}

    def caller(self, model: nn.Module, values: Mapping[str, Tensor]) -> Callable[..., Any]:
        """With the values in the buffers' places."""
        buffers = {self._buffers[n]: v for n, v in values.items()}
        return lambda **kwargs: torch.func.functional_call(model, buffers, kwargs=kwargs)

    def set_defaults(self, graph: Any) -> None:
        """Give each input the identity as its default."""
        if self.name == "inputs":
            return
        import onnx_ir as ir

        for value in graph.inputs:
            if value.name in self._buffers:
                value.const_value = ir.tensor(identity_like(self.blocks[value.name]).numpy(), name=value.name)
                graph.register_initializer(value)

    def cases(self, reference: nn.Module, signature: Signature, inputs: Mapping[str, Tensor]) -> Iterator[Case]:  # noqa: ARG002
        """The base, by default or by identities; the active adapter; and rotations that differ from site to site.

        The adapter may not have been trained yet, and then would not show blocks that went to the wrong site.
        """
        plain = {} if self.name == "swappable" else {n: identity_like(b) for n, b in self.blocks.items()}
        base = self.without(signature)
        yield Case("without an adapter", plain, base, self.model)
        yield Case(f"with adapter {self.active[0]!r}", self.blocks, partial(signature.run, reference), reference, base)
        other = _random_like(self.blocks)
        expected = partial(signature.run, self.caller(reference, other))
        yield Case("with random rotations", other, expected, reference, base)

    def metadata(self) -> dict[str, str]:
        """Also which sites read which blocks."""
        return super().metadata() | {ROTATIONS: json.dumps(dict(self.slots.names))}


def _random_like(blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, value in blocks.items():
        size = value.shape[-1]
        skew = 0.1 * torch.randn(len(value), skew_size(size), generator=generator, dtype=value.dtype)
        found[name] = cayley(skew, size, parameterization="cayley")
    return found


def only_active(mode: AdapterMode) -> str:
    """The one adapter that says which sites the graph rotates.

    Raises:
        ExportError: none acts, or several do; or fixed rotations act as well.
    """
    if len(mode.active) != 1:
        acting = f"there are {len(mode.active)}: {', '.join(mode.active)}" if mode.active else "there is none"
        raise ExportError(
            f"adapters={mode.name!r} takes its sites and block sizes from the active adapter, and {acting}; activate "
            "one with oftfx.set_adapter"
        )
    if kept := next((fqn for fqn, p in rotated_sites(mode.model) if p.fixed), None):
        raise ExportError(
            f"{kept} has a fixed rotation, left by fold(quantized='keep'), before its adapters; adapters={mode.name!r} "
            "needs a model that was not folded"
        )
    return mode.active[0]
