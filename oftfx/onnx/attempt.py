"""One export under way."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn as nn

from oftfx.onnx.adapters import AdapterMode
from oftfx.onnx.signature import Signature


@dataclass(frozen=True, eq=False)
class Attempt:
    """What an export writes, and what its file is held against.

    Attributes:
        lowered: the model that is exported.
        reference: what the file has to compute with the active adapters, in torch.
        mode: what becomes of the adapters.
        signature: how both are called.
        outputs: names of the outputs.
        opset: of the file.
        dialect: whose operators it may have.
        deviation: largest relative change of a quantized weight that the file may make; see `lower_quantized`.
    """

    lowered: nn.Module
    reference: nn.Module
    mode: AdapterMode
    signature: Signature
    outputs: tuple[str, ...]
    opset: int
    dialect: str
    deviation: float = 0.0
