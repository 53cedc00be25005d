"""How far rotations turn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def angles_of(chain: Sequence[Tensor]) -> tuple[float | None, float | None]:
    """The largest principal angle of a rotation's blocks, and their root mean square, in degrees.

    A block R has the principal angles θ of its planes: ``2 sin(θ/2)`` are the singular values of ``R - I``, which is
    exact also where θ is small and a cosine would round to 1. (A Neumann series with few terms gives blocks that are
    orthogonal only nearly; so are their angles.)

    Args:
        chain: blocks ``(blocks, size, size)``; of several rotations in a row that were not multiplied into one the
            angles of the whole are not known: None.

    Examples:
        >>> import torch
        >>> c, s = math.cos(0.1), math.sin(0.1)
        >>> largest, typical = angles_of([torch.tensor([[[c, -s], [s, c]], [[1.0, 0.0], [0.0, 1.0]]])])
        >>> round(math.radians(largest), 6), round(math.radians(typical), 6)
        (0.1, 0.070711)
    """
    if len(chain) != 1:
        return None, None
    blocks = chain[0].detach().to("cpu", torch.float64)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    chords = torch.linalg.svdvals(blocks.reshape(-1, *blocks.shape[-2:]) - eye)
    angles = 2 * torch.asin((chords / 2).clamp(max=1.0))
    return math.degrees(float(angles.max())), math.degrees(float(angles.square().mean().sqrt()))
