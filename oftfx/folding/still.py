"""Run a model without letting runtimes change the weights of layers that a fold does not touch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch.nn as nn

from oftfx.formats.registry import format_of
from oftfx.placement.find import placements_on


@contextmanager
def held_still(*models: nn.Module) -> Iterator[None]:
    """Inside, no forward repacks a quantized layer that has no rotation of ours (one that has is kept from it anyway).

    On a CPU with AVX512-BF16 an eval forward of bitsandbytes' rounds all scales to bfloat16, and a fold that only runs
    the model to look at it would write that.
    """
    free = _hold(models)
    del models  # what is replaced meanwhile is not kept
    try:
        yield
    finally:
        for release in free:
            release()


def _hold(models: Iterable[nn.Module]) -> list[Callable[[], None]]:
    free = list[Callable[[], None]]()
    for module in {m for model in models for m in model.modules()}:
        known = format_of(module)
        if known is not None and not known.lossless and not placements_on(module):
            free.append(known.hold_still(module))
    return free
