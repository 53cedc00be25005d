"""What a reader keeps for backward of the rotated weight that was lent to it: how to make it again.

A layer saves its weight for the gradient of its input. A rotated weight is made of the weight and the blocks, which
are there anyway, so when the reader has ended, what it has saved of the rotated one is exchanged for those. Backward
makes it again by the same operations, which give the same bytes, and once: its own backward needs it as well.

Only tensors that share memory with the rotated weight are exchanged, and casts of all of it (autocast), in the nodes
that the output comes from and that were made since. Everything else is torch's, and so is every node whose saved
tensors somebody else's hooks see to (gradient checkpointing, `torch.autograd.graph.save_on_cpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oftfx.placement.torch_private import saved_by, sequence_number
from oftfx.rotation.remade import again, is_remade, is_watched


class Lent:
    """A rotated weight while its reader runs; None of this is kept after that."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.version, self.node = weight, weight._version, weight.grad_fn
        # Without their history, but with their version counters.
        self.of = [t.detach() for t in self.node.saved_tensors]  # type: ignore[union-attr]

    @staticmethod
    def of_call(weight: Tensor | None) -> Lent | None:
        """Of a weight that is lent now; None where it is saved as it is."""
        lends = weight is not None and is_remade(weight.grad_fn) and not is_watched() and weight.data_ptr()
        return Lent(weight) if lends else None  # type: ignore[arg-type]

    def recipe(self, saved: Tensor) -> Callable[[], Tensor] | None:
        """Makes a tensor again that a node has saved; None of another one."""
        if type(saved) is not Tensor or saved.layout != torch.strided or saved.device != self.weight.device:
            return None
        place = _Place(saved.shape, saved.stride(), saved.storage_offset())
        if saved.untyped_storage().data_ptr() == self.weight.untyped_storage().data_ptr():
            return _Again(self, place, saved.dtype, None) if saved.dtype == self.weight.dtype else None
        whole = saved if saved._base is None else saved._base
        cast = whole.grad_fn
        if cast is None or cast.name() != "ToCopyBackward0" or cast.next_functions[0][0] is not self.node:
            return None
        return _Again(self, place, whole.dtype, whole.stride()) if not whole._version else None


class _Place(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Again:
    """Makes what was saved; holds the weight, the blocks and the node that has made the rotated weight."""

    def __init__(self, lent: Lent, place: _Place, dtype: torch.dtype, stride: tuple[int, ...] | None) -> None:
        self.node, self.of, self.versions = lent.node, lent.of, [t._version for t in lent.of]
        self.place, self.dtype, self.stride = place, dtype, stride

    def __call__(self) -> Tensor:
        for tensor, version in zip(self.of, self.versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"[{tensor.type()} {list(tensor.shape)}], of which a rotated weight was made, is at version "
                    f"{tensor._version}; expected version {version} instead"
                )
        whole = again(self.node, self.of)
        if self.stride is not None:
            whole = whole.to(self.dtype)
            if whole.stride() != self.stride:
                whole = whole.new_empty_strided(whole.shape, self.stride).copy_(whole)
        return whole.as_strided(*self.place)


def keep_recipes(lent: Sequence[Lent], inputs: Any, output: Any) -> None:
    """Exchange what the reader, which has just ended, has saved of what was lent to it.

    Args:
        lent: to one call.
        inputs: of that call; nothing before them is looked at.
        output: of that call.
    """
    lent = [one for one in lent if one.weight._version == one.version]  # what was written to since is another tensor
    if not lent:
        return
    first = min(sequence_number(one.node) for one in lent)
    seen = {t.grad_fn for t in _tensors(inputs)}
    nodes = [t.grad_fn for t in _tensors(output)]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or sequence_number(node) <= first:
            continue
        seen.add(node)
        nodes.extend(n for n, _ in node.next_functions)
        for saved, tensor in saved_by(node):
            recipe = next((r for r in (one.recipe(tensor) for one in lent) if r is not None), None)
            if recipe is not None:
                saved.register_hooks(lambda _, recipe=recipe: recipe, lambda recipe: recipe())


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
