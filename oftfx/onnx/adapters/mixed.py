"""One batch for several adapters: each row of it is rotated by its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.store import located
from oftfx.adapter.switch import set_adapter
from oftfx.errors import ExportError
from oftfx.model.structure import structural_copy
from oftfx.onnx.adapters.base import AdapterMode, Case
from oftfx.onnx.adapters.blocks import Slots, adapter_blocks, identity_like
from oftfx.onnx.adapters.swappable import only_active
from oftfx.onnx.signature import Signature
from oftfx.placement.find import rotated_sites
from oftfx.rotation.frozen import FrozenRotation
from oftfx.serving.copied.runtime.contract import ADAPTER_INDEX, ADAPTER_NAMES


class Choice:
    """Which adapter each row of the current batch has.

    Attributes:
        rows: int64 ``(batch,)``; None outside a call.
    """

    rows: Tensor | None = None


class RowRotation(FrozenRotation):
    """``y[i] = x[i] @ blockdiag(R[choice[i]])``.

    Attributes:
        blocks: buffer ``(adapters, blocks, b, b)``.
    """

    def __init__(self, blocks: Tensor, choice: Choice, site: str) -> None:
        super().__init__(blocks)
        self._choice, self._site = choice, site

    @property
    def shape(self) -> tuple[int, int]:
        """``(blocks, b)``."""
        return self.blocks.shape[1], self.blocks.shape[2]

    def forward(self, x: Tensor) -> Tensor:
        """``x (batch, ..., n)``; the rows of the batch are on its first axis."""
        rows = self._choice.rows
        if rows is None:
            raise ExportError(f"{self._site}: nothing has chosen an adapter; a mixed model runs in its exporter only")
        if x.dim() < 2 or x.shape[0] != rows.shape[0]:
            raise ExportError(
                f"{self._site}: its input has the shape {tuple(x.shape)}, in which the rows of the batch cannot be "
                "told; adapters='mixed' needs the batch on axis 0. Leave the site out by a rule"
            )
        chosen = self.blocks.to(x.dtype).index_select(0, rows)
        split = x.reshape(x.shape[0], -1, *self.shape).transpose(1, 2)
        return torch.matmul(split, chosen).transpose(1, 2).reshape(x.shape)


class Mixed(AdapterMode):
    """All adapters of the model in a stack, the identity first; an input chooses for each row."""

    slots: Slots

    def __init__(self, model: nn.Module, name: str = "mixed") -> None:
        super().__init__(model, name)
        active = only_active(self)
        self.named = tuple(located(model)[1].adapters)
        self.slots = Slots.of(model, active)
        every = {n: adapter_blocks(model, n, self.slots) for n in self.named}
        sites = every[active]
        self._stacks = {
            n: torch.stack([identity_like(b), *(blocks.get(n, identity_like(b)) for blocks in every.values())])
            for n, b in sites.items()
        }
        self._choice = Choice()

    def prepared(self, lowered: nn.Module) -> Mixed:
        """With a stack in the place of each frozen rotation, and a choice of its own."""
        result = copy.copy(self)
        result._choice = Choice()
        made: dict[int, RowRotation] = {}
        for fqn, placement in list(rotated_sites(lowered)):
            if placement.kind != "activation":
                raise ExportError(
                    f"{fqn}: this rotation acts on the weight, which all rows of a batch share; adapters='mixed' needs "
                    "rotations of activations. Leave the site out by a rule, or export with adapters='swappable'"
                )
            (frozen,) = placement.fixed
            row = made.setdefault(id(frozen), RowRotation(self._stacks[self.slots.names[fqn]], result._choice, fqn))
            placement.fixed[:] = [row]
            placement.forget()
            holder = placement.holder
            for child, held in list(holder.named_children()) if holder is not None else ():
                if held is frozen:
                    setattr(holder, child, row)
        return result

    def inputs(self, signature: Signature) -> dict[str, Tensor]:
        """``adapter_index``."""
        if signature.batch is None:
            raise ExportError("adapters='mixed' needs a dynamic batch: axis 0 of an input in dynamic_shapes")
        return {ADAPTER_INDEX: torch.arange(signature.rows(signature.inputs)) % (len(self.named) + 1)}

    def shapes(self, signature: Signature) -> dict[str, dict[int, str]]:
        """As long as the batch."""
        return {ADAPTER_INDEX: {0: signature.batch or ""}}

    def caller(self, model: nn.Module, values: Mapping[str, Tensor]) -> Callable[..., Any]:
        """With every rotation knowing the rows' adapters."""

        def call(**kwargs: Any) -> Any:
            rows = values[ADAPTER_INDEX]
            # `Gather` counts negative places from the end: an unknown adapter would be the last one, without an error.
            self._choice.rows = torch.where(rows < 0, len(self.named) + 1, rows)
            try:
                return model(**kwargs)
            finally:
                self._choice.rows = None

        return call

    def cases(self, reference: nn.Module, signature: Signature, inputs: Mapping[str, Tensor]) -> Iterator[Case]:  # noqa: ARG002
        """All adapters and the base, as many at a time as the batch has rows, against each row alone in torch."""
        count, every = signature.rows(inputs), torch.arange(len(self.named) + 1).flip(0)
        for start in range(0, len(every), count):
            rows = every[(start + torch.arange(count)) % len(every)]
            base = self.without(signature) if bool(rows.any()) else None
            label = f"with adapters {rows.tolist()} for its rows"
            yield Case(label, {ADAPTER_INDEX: rows}, partial(self._by_row, signature, rows.tolist()), None, base)

    def _by_row(self, signature: Signature, places: list[int], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = structural_copy(self.model).eval()
        parts = []
        for index, place in enumerate(places):
            set_adapter(model, self.named[place - 1] if place else None)
            parts.append(signature.run(model, signature.row(inputs, index)))
        if single := next((n for n, v in parts[0].items() if not v.dim()), None):
            raise ExportError(
                f"output {single} is one number for a whole batch; adapters='mixed' needs one for each row"
            )
        return {n: torch.cat([p[n] for p in parts]) for n in parts[0]}

    def metadata(self) -> dict[str, str]:
        """Also the names in the order of the stack."""
        return super().metadata() | {ADAPTER_NAMES: json.dumps(["", *self.named])}
