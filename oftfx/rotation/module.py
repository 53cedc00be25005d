"""The module that holds a trainable rotation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.rotation.accelerate import HOOK, keep_here
from oftfx.rotation.caching import caching, count_steps, steps
from oftfx.rotation.cayley import cayley
from oftfx.rotation.cayley import project as project_norm
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.glimpse import Glimpse
from oftfx.rotation.identity import Identity
from oftfx.rotation.rotate import rotate
from oftfx.rotation.skew import remembered, skew_matrix, skew_size, skew_vector
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
    of it (averaged weights, scaling); otherwise call `oftfx.refresh`.

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
        self._identity = Identity()
        self._glimpse = Glimpse()
        self.copies, self.tied = copies, tied
        self.in_features = in_features * copies
        blocks, self.block_size = spec.geometry(in_features, where)
        self.blocks = blocks * copies
        rows = skew_rows(spec, blocks, copies, tied)
        self.skew = nn.Parameter(torch.empty(rows, skew_size(self.block_size), dtype=dtype, device=device))
        self.dropout = BlockDropout(spec.dropout) if spec.dropout else None
        self.reset()
        self.forget()

    def reset(self) -> None:
        """Set skew to the start that the spec asks for."""
        with torch.no_grad():
            if self.spec.init == "normal":
                self.skew.normal_(std=0.1)
            else:
                self.skew.zero_()

    def forget(self) -> None:
        """Drop what eval mode has cached, here and wherever the blocks went."""
        self._cached: tuple[Any, Tensor] | None = None
        self._identity.forget()
        self._glimpse.forget()

    def matrices(self) -> Tensor:
        """Blocks ``(blocks, b, b)`` in float32 or wider: without dropout, never cached, differentiable."""
        return self.spread(self.formula(whole(self.skew)))

    def formula(self, skew: Tensor) -> Tensor:
        """A block ``(rows, b, b)`` for each row of ``skew``, by this rotation's parameterization."""
        spec = self.spec
        return cayley(
            skew,
            self.block_size,
            parameterization=spec.parameterization,
            terms=spec.terms,
            # The bound of one rotation counts its own blocks only.
            coft_eps=None if spec.coft_eps is None else spec.coft_eps * self.copies**0.5,
        )

    def spread(self, rows: Tensor) -> Tensor:
        """One entry a block ``(blocks, ...)`` from one a row of ``skew``, where blocks share a row."""
        if rows.shape[0] == self.blocks:
            return rows
        if self.spec.block_share:
            tail = (-1,) * (rows.dim() - 1)
            return rows.unsqueeze(1).expand(-1, self.blocks // self.copies, *tail).flatten(0, 1)
        return rows.index_select(0, remembered(_rows, self.tied, rows.device))

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
        """Blocks ``(blocks, b, b)`` of this forward: in training with dropout."""
        return self.dropped(self.matrices())

    def dropped(self, blocks: Tensor) -> Tensor:
        """Blocks after dropout, in training."""
        return blocks if self.dropout is None else self.dropout(blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """``(blocks, b)``."""
        return self.blocks, self.block_size

    @property
    def device(self) -> torch.device:
        """Where the parameter is."""
        return self.skew.device

    def stamp(self) -> tuple[Any, ...]:
        """What tells this rotation from another, and from itself after a change."""
        skew = self.skew
        version = 0 if skew.is_inference() else skew._version
        seen = self._glimpse.of(skew) if type(skew) is nn.Parameter and not torch.compiler.is_compiling() else b""
        return self._identity.of(skew), version, seen, steps(), skew.requires_grad, self.training

    def state(self) -> tuple[Any, ...] | None:
        """What the blocks depend on, where they may be kept for the next forward; None where they may not."""
        if self.training:
            return None
        skew = self._parameters.get("skew")  # quicker than by the attribute, and this is asked for every token
        if skew is None or not self._cacheable(skew):
            return None
        # The glimpse starts with the address.
        return self._identity.of(skew), skew._version, self._glimpse.at(skew), skew.device, steps()

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x (..., n)``; shape and dtype are kept."""
        state = self.state()
        if state is None:
            return rotate(x, self.effective())
        # A cast a forward would cost as much as the product for one token, so the dtype is part of the key.
        key = (*state, x.dtype)
        cached = self._cached
        if cached is None or cached[0] != key:
            # A tensor made under inference_mode could not be used by a later training forward.
            with torch.inference_mode(False), torch.no_grad():
                cached = (key, self.matrices().to(x.dtype).contiguous())
            if type(cached[1]) is Tensor:  # neither fake nor functional
                self._cached = cached
        return rotate(x, cached[1])

    def _cacheable(self, skew: Tensor) -> bool:
        if (torch.is_grad_enabled() and skew.requires_grad) or not caching():
            return False
        # No plain parameter: `functional_call` has put a tensor in its place, or FSDP a shard.
        return type(skew) is nn.Parameter and not skew.is_meta and not skew.is_inference()

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
        if name == "skew" and "_cached" in self.__dict__:
            self.forget()

    def train(self, mode: bool = True) -> Rotation:
        """Set the mode; a change drops the cache."""
        if mode != self.training:
            self.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Rotation:
        self.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        count_steps()
        super().__setstate__(state)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{self.in_features}, blocks={self.blocks}, block_size={self.block_size}, {spec.parameterization}"


@lru_cache(maxsize=256)
def _rows(tied: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(tied, device=device)


def skew_rows(spec: OFT, blocks: int, copies: int = 1, tied: tuple[int, ...] = ()) -> int:
    """Rows of ``skew`` for ``blocks`` blocks a rotation."""
    return copies if spec.block_share else len(set(tied)) or copies * blocks


def cayley_of(rotations: Sequence[Rotation | FrozenRotation]) -> list[Tensor]:
    """`Rotation.effective` of several rotations of one size; those of one spec in one batch."""
    first = rotations[0]
    if isinstance(first, FrozenRotation) or first.spec.coft_eps is not None or len(rotations) == 1:
        return [r.effective() for r in rotations]
    trainable = [r for r in rotations if isinstance(r, Rotation)]
    if any(_formula(r) != _formula(first) for r in trainable):
        return [r.effective() for r in rotations]
    rows = first.formula(torch.cat([whole(r.skew) for r in trainable]))
    parts = rows.split([r.skew.shape[0] for r in trainable])
    return [r.dropped(r.spread(p)) for r, p in zip(trainable, parts, strict=True)]


def _formula(rotation: Rotation) -> tuple[Any, ...]:
    spec = rotation.spec
    return spec.parameterization, spec.terms, spec.coft_eps, rotation.block_size, rotation.skew.dtype
