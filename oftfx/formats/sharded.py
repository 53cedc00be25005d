"""Weights of which every process has a part: those of FSDP2 (``fully_shard``), and of tensor parallelism.

A rotation acts on columns, so each process turns its own rows, and nothing is gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FormatError
from oftfx.formats.base import WeightState
from oftfx.formats.dense import FLOATS, Dense, kind_of


class ShardedRows(Dense):
    """The rows of a layer's weight that are here; it is written where it lies, for FSDP knows the place.

    Not registered: sharded layers are no sites of a model that is yet to be transformed.
    """

    def matches(self, module: nn.Module) -> bool:
        """A float weight that is cut along its rows only."""
        weight: Any = module._parameters.get(self.parameter)
        if not is_sharded(weight) or weight.dtype not in FLOATS or kind_of(module) is None:
            return False
        whole_rows = all(p.is_replicate() or getattr(p, "dim", None) == 0 for p in weight.placements)
        return whole_rows and self.layout(module).stored == "rows"

    def read(self, module: nn.Module) -> WeightState:
        """A copy: what is here will be written over."""
        return {self.parameter: nn.Parameter(self._weight(module).detach().clone(), requires_grad=False)}

    def write(self, module: nn.Module, state: WeightState) -> None:
        """Into the same memory."""
        with torch.no_grad():
            self._weight(module).copy_(state[self.parameter])

    def is_empty(self, module: nn.Module) -> bool:
        """Whether no row is here: there are more processes than rows."""
        return self._weight(module).numel() == 0

    def _weight(self, module: nn.Module) -> Any:
        weight: Any = module._parameters.get(self.parameter)
        if not is_sharded(weight):
            raise FormatError(f"the weight of this {type(module).__name__} is not sharded any more")
        local: Tensor = weight.to_local()
        return local


def is_sharded(weight: Any) -> bool:
    """Whether a tensor is a part of one that lies in several processes."""
    return hasattr(weight, "full_tensor") and hasattr(weight, "placements")


def cut_of(module: nn.Module) -> str | None:
    """How a layer is cut of which this process has a part only; None where it is whole.

    Such a layer is not rotated: the rotation of one that is cut along its inputs would have to be cut with them, and
    gradients be added up over the processes. Seen are torch's DTensors, and the forwards that transformers'
    tensor parallelism installs, for its quantized weights are plain parts.
    """
    parts: list[tuple[str, Any]] = [(n, p) for n, p in module._parameters.items() if is_sharded(p)]
    forward: Any = vars(module).get("forward")
    if parts:
        name, weight = parts[0]
        along = ", ".join(str(p) for p in weight.placements)
        return f"its {name} {tuple(weight.shape)} lies in {weight.device_mesh.size()} processes ({along})"
    if getattr(forward, "__module__", "").startswith("transformers.distributed."):
        return "transformers runs it on a part of its weight (tensor parallelism)"
    return None


WHOLE = (
    "Rotations go into whole layers. FSDP2: transform first, then fully_shard. Tensor parallelism: load the model "
    "without it (tp_plan, parallelize_module), train with DDP or FSDP2, fold, and load the folded checkpoint with it"
)
"""What to do instead."""


def groups_of(module: nn.Module, parameter: str = "weight") -> list[Any]:
    """The groups of processes that have the other rows, one for each axis of the mesh along which it is cut."""
    weight: Any = module._parameters[parameter]
    cut = [i for i, p in enumerate(weight.placements) if not p.is_replicate()]
    return [weight.device_mesh.get_group(i) for i in cut]


def reshard(model: nn.Module) -> bool:
    """Let FSDP2 drop the whole weights that it keeps after a forward; whether the model is sharded by it.

    What is written into those would be gone with them.
    """
    units: list[Any] = [m for m in model.modules() if any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]
    for unit in units:
        unit.reshard()
    return bool(units)
