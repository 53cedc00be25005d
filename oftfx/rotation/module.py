"""The module that holds a trainable rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.rotation.accelerate import HOOK, keep_here
from oftfx.rotation.caching import count_steps, keeping, steps
from oftfx.rotation.cayley import project as project_norm
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.kept import Kept, Source, forget_kept, may_be_kept, source_of
from oftfx.rotation.operators import blocks_in_graph, in_graph, rotate_in_graph
from oftfx.rotation.recipe import Recipe, blocks_by
from oftfx.rotation.rotate import rotate
from oftfx.rotation.skew import skew_matrix, skew_size, skew_vector
from oftfx.rotation.spec import OFT


def whole(skew: Tensor) -> Tensor:
    """The whole parameter where FSDP has only a shard here: a rotation that is used outside its owner's forward."""
    if not hasattr(skew, "full_tensor"):
        return skew
    from torch.distributed.tensor import Partial

    return skew.full_tensor(grad_placements=[Partial("avg")] * skew.device_mesh.ndim)


class BlockDropout(nn.Module):
    """Replace each block by the identity with probability ``p``, in training; drawn anew in every forward.

    Source: multiplicative dropout of BOFT, arXiv 2311.06243 section 5, on independent draws.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, blocks: Tensor) -> Tensor:
        """``(blocks, b, b)`` in, ``(blocks, b, b)`` out."""
        if not self.training:
            return blocks
        kept = torch.rand(blocks.shape[0], 1, 1, device=blocks.device) >= self.p
        return torch.where(kept, blocks, torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Rotation(nn.Module):
    """One trainable block-diagonal rotation ``y = x @ blockdiag(R(skew))``.

    In eval mode without gradients the blocks are computed once and kept until the parameter's version changes
    (an optimiser step, ``load_state_dict``, ``copy_``), an optimiser steps, it moves, or the module changes mode.
    Writing through ``.data`` is invisible to torch. On a CPU a look at a few bytes of the tensor sees what writes all
    of it (averaged weights, scaling); otherwise call `oftfx.refresh`. A CUDA graph's replays look at nothing, and
    `oftfx.refresh` says when it has to be called for them.

    Args:
        in_features: length of the axis that one rotation turns.
        spec: how.
        where: module path, for messages.
        copies: rotations in a row, one for each expert of a layer; the axis is ``copies * in_features`` long.
        tied: for each block the row of ``skew`` that it is made from, where several share one: grouped heads of an
            attention, which read the same rows of their producer. Empty: each its own.
        dtype: of ``skew``.
        device: of ``skew``.

    Attributes:
        skew: ``(blocks, b (b - 1) / 2)``, or ``(copies, ...)`` with ``block_share``; float32, or float64 for
            float64 weights.
        spec: the `OFT` it was made from.
        blocks: number of blocks, of all copies together.
        block_size: ``b``.

    Raises:
        RuleError: the size or number of blocks does not divide ``in_features``.

    Examples:
        >>> import oftfx, torch
        >>> rotation = oftfx.Rotation(6, oftfx.OFT(3, parameterization="cayley", init="normal"))
        >>> tuple(rotation.skew.shape), tuple(rotation.matrices().shape)
        ((2, 3), (2, 3, 3))
        >>> x = torch.randn(5, 6)
        >>> torch.allclose(rotation(x).norm(dim=1), x.norm(dim=1)), torch.allclose(rotation(x), x)
        (True, False)
    """

    def __init__(
        self,
        in_features: int,
        spec: OFT,
        *,
        where: str = "rotation",
        copies: int = 1,
        tied: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        count_steps()
        self.spec = spec
        self._source: Source | None = None
        self._kept: Kept | None = None
        self.copies, self.tied = copies, tied
        self.in_features = in_features * copies
        blocks, self.block_size = spec.geometry(in_features, where)
        self.blocks = blocks * copies
        self.recipe = Recipe(
            blocks=self.blocks,
            block_size=self.block_size,
            parameterization=spec.parameterization,
            terms=spec.terms,
            coft_eps=spec.coft_eps,
            block_share=spec.block_share,
            copies=copies,
            tied=tied,
        )
        self.recipe_text = self.recipe.text()
        rows = skew_rows(spec, blocks, copies, tied)
        self.skew = nn.Parameter(torch.empty(rows, skew_size(self.block_size), dtype=dtype, device=device))
        self.dropout = BlockDropout(spec.dropout) if spec.dropout else None
        self.reset()

    def reset(self) -> None:
        """Set skew to the start that the spec asks for."""
        with torch.no_grad():
            if self.spec.init == "normal":
                self.skew.normal_(std=0.1)
            else:
                self.skew.zero_()

    def forget(self) -> None:
        """Drop what eval mode has kept, here and wherever the blocks went."""
        self._source = self._kept = None
        forget_kept(self._parameters.get("skew"))

    def matrices(self) -> Tensor:
        """Blocks ``(blocks, b, b)`` in float32 or wider: without dropout, never kept, differentiable."""
        return self.recipe(whole(self.skew))

    def formula(self, skew: Tensor) -> Tensor:
        """A block ``(rows, b, b)`` for each row of ``skew``, by this rotation's parameterization."""
        return self.recipe.formula(skew)

    def spread(self, rows: Tensor) -> Tensor:
        """One entry a block ``(blocks, ...)`` from one a row of ``skew``, where blocks share a row."""
        return self.recipe.spread(rows)

    def every_skew(self) -> Tensor:
        """``skew`` as files hold it: a row a block, also of tied ones; one row with ``block_share``."""
        return self.skew if self.spec.block_share else self.spread(self.skew)

    @torch.no_grad()
    def set_every_skew(self, skew: Tensor) -> None:
        """Inverse of `every_skew`; of tied blocks, the first one's row counts."""
        if self.tied and not self.spec.block_share:
            skew = skew[[self.tied.index(row) for row in range(self.skew.shape[0])]]
        self.skew.copy_(skew)

    def effective(self) -> Tensor:
        """Blocks ``(blocks, b, b)`` of this forward, to be read only: in training with dropout, in eval mode kept."""
        if self.is_in_graph():
            return blocks_in_graph(self.skew, self.recipe_text)
        state = self.state()
        if state is not None:
            return self._read(state, torch.promote_types(self.skew.dtype, torch.float32))
        return self.dropped(self.matrices())

    def is_in_graph(self, *xs: Tensor) -> bool:
        """Whether what is compiled now asks for the blocks instead of making them; see `in_graph`."""
        return in_graph(self.skew, *xs) and not self.training

    def dropped(self, blocks: Tensor) -> Tensor:
        """Blocks after dropout, in training."""
        return blocks if self.dropout is None else self.dropout(blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """``(blocks, b)``."""
        return self.blocks, self.block_size

    @property
    def tensor(self) -> Tensor:
        """What the blocks are made from."""
        return self.skew

    @property
    def device(self) -> torch.device:
        """Where the parameter is."""
        return self.skew.device

    def stamp(self) -> tuple[Any, ...]:
        """What tells this rotation from another, and from itself after a change."""
        skew = self.skew
        return *self.source(skew).stamp(skew), steps(), skew.requires_grad, self.training

    def source(self, skew: Tensor) -> Source:
        """What is known of the tensor that stands here now."""
        source = self._source  # read once: another thread may replace it
        if source is None or source.tensor() is not skew:
            source = self._source = source_of(skew)
        return source

    def state(self) -> tuple[Any, ...] | None:
        """What the blocks depend on, where they may be kept for the next forward; None where they may not."""
        if self.training:
            return None
        skew = self._parameters.get("skew")  # quicker than by the attribute, and this is asked for every token
        if skew is None or not self._cacheable(skew):
            return None
        return self.source(skew).state(skew)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x (..., n)``; shape and dtype are kept."""
        blocks = self.current(x.dtype)
        if blocks is not None:
            return rotate(x, blocks)
        state = self.state()
        if state is not None:
            return rotate(x, self._read(state, x.dtype))
        if self.is_in_graph(x):
            return rotate_in_graph(x, self.skew, self.recipe_text)
        return rotate(x, self.dropped(self.matrices()))

    def current(self, dtype: torch.dtype) -> Tensor | None:
        """The blocks that this rotation had last, where they are still right; asked for every token, so it is quick."""
        if self.training or not keeping():
            return None
        skew, kept = self._parameters.get("skew"), self._kept
        if kept is None or skew is None or kept.dtype is not dtype or kept.sources[0].tensor() is not skew:
            return None
        here: Tensor = skew
        return None if torch.is_grad_enabled() and here.requires_grad else kept.current(here)

    def _read(self, state: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        """The blocks that are kept, in a dtype: a cast a forward would cost as much as the product for one token."""
        skew, source, kept = self.skew, self._source, self._kept
        if kept is None or kept.dtype is not dtype or kept.sources[0] is not source:
            kept = self._kept = self.source(skew).kept((), (self.recipe_text,), dtype)
        return kept.read((skew,), (state, steps()))

    def _cacheable(self, skew: Tensor) -> bool:
        if (torch.is_grad_enabled() and skew.requires_grad) or not keeping():
            return False
        # No plain parameter: `functional_call` has put a tensor in its place, or FSDP a shard.
        return type(skew) is nn.Parameter and may_be_kept(skew)

    @torch.no_grad()
    def project_(self) -> None:
        """Write COFT's projection into ``skew``; for use after an optimiser step. A forward never does it.

        ``skew`` then lies inside the ball that `cayley` clips to anyway, so no output changes; only the optimiser
        no longer pushes against the wall. Nothing happens without ``coft_eps``.
        """
        if self.spec.coft_eps is not None:
            q = project_norm(skew_matrix(self.skew, self.block_size), self.spec.coft_eps)
            self.skew.copy_(skew_vector(q))

    def __setattr__(self, name: str, value: Any) -> None:
        """Forget with a new parameter; FSDP, for one, puts gathered values into an object that was there before."""
        super().__setattr__(name, value)
        if name == HOOK:
            keep_here(self, value)
        if name == "skew" and "_kept" in self.__dict__:
            self.forget()

    def train(self, mode: bool = True) -> Rotation:
        """Set the mode; a change drops the cache."""
        if mode != self.training:
            self.forget()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()  # what a captured graph reads is written anew at once

    def _apply(self, fn: Any, recurse: bool = True) -> Rotation:
        self.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None, "_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        count_steps()
        super().__setstate__(state)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{self.in_features}, blocks={self.blocks}, block_size={self.block_size}, {spec.parameterization}"


def skew_rows(spec: OFT, blocks: int, copies: int = 1, tied: tuple[int, ...] = ()) -> int:
    """Rows of ``skew`` for ``blocks`` blocks a rotation."""
    return copies if spec.block_share else len(set(tied)) or copies * blocks


def cayley_of(rotations: Sequence[Rotation | FrozenRotation]) -> list[Tensor]:
    """`Rotation.effective` of several rotations of one size; those of one spec in one batch."""
    trainable = [r for r in rotations if isinstance(r, Rotation)]
    if not trainable:
        return [r.effective() for r in rotations]
    blocks = blocks_by([r.recipe for r in trainable], [whole(r.skew) for r in trainable])
    return [r.dropped(b) for r, b in zip(trainable, blocks, strict=True)]
