"""A recording leaves a model as it was."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from oftfx.formats.exact import use_exact
from oftfx.formats.registry import format_of


class Undisturbed:
    """Whatever a recorded forward does to the model is undone.

    Buffers, attributes it sets (a mask made on first use would be a fake tensor), quantized weights that a runtime
    repacks, the random state; ``real`` values run in eval mode.
    """

    def __init__(self, model: nn.Module, *, real: bool) -> None:
        self.model, self.real = model, real

    def __enter__(self) -> None:
        # Each module's attributes, and what is in those that are dictionaries or lists (parameters, hooks, caches).
        self.attributes = [
            (m, dict(vars(m)), [(v, _contents(v)) for v in vars(m).values() if isinstance(v, (dict, list))])
            for m in self.model.modules()
        ]
        # Large integer buffers are packed weights: nothing counts in them, and copying them would double a model.
        self.buffers = [
            (b, b.detach().clone()) for b in self.model.buffers() if b.is_floating_point() or b.numel() < 2**16
        ]
        self.random = torch.get_rng_state()
        found = [(m, format_of(m)) for m in self.model.modules()]
        self.release = [f.hold_still(m) for m, f in found if f is not None]
        for module, weight_format in found:
            if weight_format is not None and weight_format.native_fault(module) is not None:
                use_exact(module)  # an attribute of the module, which goes with the others afterwards
        if self.real:
            self.model.eval()

    def __exit__(self, *_: object) -> None:
        for release in self.release:
            release()
        for module, attributes, contents in self.attributes:
            vars(module).clear()
            vars(module).update(attributes)
            for container, items in contents:
                if _same(container, items):
                    continue  # some refuse to be written to
                # The containers themselves may be shared (with a graph, say), so they are refilled, not replaced.
                container.clear()
                container.update(items) if isinstance(container, dict) else container.extend(items)
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        torch.set_rng_state(self.random)


def _same(container: Any, items: Any) -> bool:
    if len(container) != len(items):
        return False
    if isinstance(container, dict):
        return all(a is b and container[a] is items[b] for a, b in zip(container, items, strict=True))
    return all(a is b for a, b in zip(container, items, strict=True))


def _contents(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)
