"""gpt-oss with experts on the grid of MXFP4: their tensors and the note as a published checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError
from oftfx.folding.checkpoint import ROTATION
from oftfx.folding.report import FoldReport
from oftfx.formats.by_name import class_named
from oftfx.formats.mxfp4_experts import BLOCKS, PROJECTIONS, SCALES, Mxfp4Experts, packed_experts

_FLOATS = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def on_grid(report: FoldReport) -> bool:
    """Whether a fold has rounded to MXFP4."""
    return any(s.format == Mxfp4Experts.name for s in report)


@contextmanager
def as_mxfp4(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What to save of a model; meanwhile its configuration says that it is in MXFP4.

    Raises:
        FoldError: see `_state`.
    """
    config: Any = model.config
    before, state = getattr(config, "quantization_config", None), _state(model)
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": _FLOATS}
    try:
        yield state
    finally:
        if before is None:
            del config.quantization_config
        else:
            config.quantization_config = before


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` with the experts as blocks and scales.

    Raises:
        FoldError: some experts have other values, for which the checkpoint has no place.
    """
    state: dict[str, Any] = {k: v for k, v in model.state_dict().items() if not ROTATION.search(k)}
    for path, module in model.named_modules():
        if not class_named(module, "gpt_oss", "GptOssExperts"):
            continue
        for name in PROJECTIONS:
            key = f"{path}.{name}"
            found = packed_experts(state.pop(key).detach())
            if found is None:
                raise FoldError(
                    f"{key} has values that MXFP4 does not, while others were rounded to it, and a checkpoint has all "
                    "experts in MXFP4 or none. Fold all of them with quantized='requantize', or with 'float'"
                )
            state[key + BLOCKS], state[key + SCALES] = found
    return state
