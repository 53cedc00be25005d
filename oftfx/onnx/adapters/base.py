"""Adapters as constants of the graph; what the other modes change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor

from oftfx.adapter.store import find_store
from oftfx.adapter.switch import disable_adapters
from oftfx.model.running import evaluating
from oftfx.onnx.adapters.blocks import Slots
from oftfx.onnx.signature import Signature
from oftfx.serving.copied.runtime.contract import ADAPTERS, MODE

Outputs = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """What a file has to compute for one choice of adapters.

    Attributes:
        label: for messages; empty where there is but one choice.
        given: values of the graph's inputs for adapters.
        expected: computes the outputs in torch.
        model: the module whose layers compute them, where it is one.
        base: the same without adapters, where some act: their effect has to be far above the error.
    """

    label: str
    given: Mapping[str, Tensor]
    expected: Outputs
    model: nn.Module | None
    base: Outputs | None = None


class AdapterMode:
    """``adapters="fixed"``: the active adapters' blocks are constants.

    Args:
        model: the model as given, with its adapters.
        name: what the user called the mode.

    Attributes:
        active: the adapters that act in the model.
        named: the adapters in the file.
        slots: what the graph rotates, where adapters can be swapped or chosen.
    """

    def __init__(self, model: nn.Module, name: str = "fixed") -> None:
        self.model, self.name = model, name
        store = find_store(model)
        self.active: tuple[str, ...] = store.active if store is not None else ()
        self.named = self.active

    slots: Slots | None = None

    def prepared(self, lowered: nn.Module) -> AdapterMode:  # noqa: ARG002
        """Change the frozen model as the mode needs it; the mode for that model."""
        return self

    def inputs(self, signature: Signature) -> dict[str, Tensor]:  # noqa: ARG002
        """The graph's inputs for adapters, with examples."""
        return {}

    def shapes(self, signature: Signature) -> dict[str, dict[int, str]]:
        """Dynamic axes of `inputs`."""
        return {n: {} for n in self.inputs(signature)}

    def caller(self, model: nn.Module, values: Mapping[str, Tensor]) -> Callable[..., Any]:  # noqa: ARG002
        """The prepared model, reading these values of `inputs`."""
        return model

    def set_defaults(self, graph: Any) -> None:
        """Change the finished graph, an ``onnx_ir.Graph``."""

    def cases(self, reference: nn.Module, signature: Signature, inputs: Mapping[str, Tensor]) -> Iterator[Case]:  # noqa: ARG002
        """What to compare on these inputs; ``reference`` is the model with the active adapters frozen."""
        yield Case(
            "", {}, partial(signature.run, reference), reference, self.without(signature) if self.active else None
        )

    def without(self, signature: Signature) -> Outputs:
        """The model without its adapters."""

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with evaluating(self.model), disable_adapters(self.model):
                return signature.run(self.model, inputs)

        return run

    def metadata(self) -> dict[str, str]:
        """For the file."""
        return {MODE: self.name, ADAPTERS: ",".join(self.named)}
