"""The blocks that a fold left in front of quantized layers, for forms that know rotations of a linear layer's input."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.placement.find import rotated_sites

_SHOWN = 4


def blocks_in_front(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[Tensor]]:
    """Blocks ``(count, b, b)`` by the path of their layer, in the order in which they act; on the CPU.

    Args:
        model: a folded model.
        layers: its quantized layers by path.

    Raises:
        FoldError: a rotation is in front of something else.
    """
    found, wrong = dict[str, list[Tensor]](), dict[str, str]()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for fqn, placement in rotated_sites(model):
        if not placement.fixed:
            continue
        found[fqn] = [rotation.blocks.detach().cpu().contiguous() for rotation in placement.fixed]
        if placement.kind != "activation" or fqn not in layers:
            wrong[fqn] = "its rotation turns no input of a quantized linear layer"
        elif placement.module is head:
            wrong[fqn] = "it is the output head, which a server computes in a way of its own"
    refuse(wrong, "fold these with quantized='float', 'requantize' or 'calibrate': quantized=lambda site: ...")
    return found


def refuse(wrong: Mapping[str, str], advice: str) -> None:
    """Raise `FoldError` with the reasons of some sites, and what to do about all; nothing where there are none."""
    if not wrong:
        return
    lines = [f"{fqn}: {reason}" for fqn, reason in [*wrong.items()][:_SHOWN]]
    more = f"; and {len(wrong) - _SHOWN} more sites" if len(wrong) > _SHOWN else ""
    raise FoldError(f"{'; '.join(lines)}{more}. {advice[0].upper()}{advice[1:]}")
