"""How far results may be apart."""

from __future__ import annotations

import torch

# Largest relative error of a whole model, by what a pass promises and the dtype of the output.
# Measured on SmolLM2 after folding 210 sites: float32 2e-6, bfloat16 5e-3.
BOUNDS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 1e-2,
}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """``|got - expected| / |expected|``, Frobenius, in float64."""
    difference = torch.linalg.vector_norm(got.detach().double() - expected.detach().double())
    scale = torch.linalg.vector_norm(expected.detach().double())
    return float(difference / scale) if scale > 0 else float(difference)
