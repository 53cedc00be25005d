"""How blocks are made from a skew: everything but the numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from oftfx.errors import GuardError
from oftfx.rotation.cayley import Parameterization, cayley
from oftfx.rotation.skew import remembered
from oftfx.typed_json import made, parsed


@dataclass(frozen=True)
class Recipe:
    """From ``skew (rows, b (b - 1) / 2)`` to blocks ``(blocks, b, b)``; see `Rotation` for what the fields mean."""

    blocks: int
    block_size: int
    parameterization: Parameterization
    terms: int
    coft_eps: float | None
    block_share: bool
    copies: int
    tied: tuple[int, ...]

    def __call__(self, skew: Tensor) -> Tensor:
        """The blocks, in float32 or wider; differentiable."""
        return self.spread(self.formula(skew))

    def formula(self, skew: Tensor) -> Tensor:
        """A block ``(rows, b, b)`` for each row of ``skew``, by the parameterization."""
        return cayley(
            skew,
            self.block_size,
            parameterization=self.parameterization,
            terms=self.terms,
            # The bound of one rotation counts its own blocks only.
            coft_eps=None if self.coft_eps is None else self.coft_eps * self.copies**0.5,
        )

    def spread(self, rows: Tensor) -> Tensor:
        """One entry a block ``(blocks, ...)`` from one a row of ``skew``, where blocks share a row."""
        if rows.shape[0] == self.blocks:
            return rows
        if self.block_share:
            tail = (-1,) * (rows.dim() - 1)
            return rows.unsqueeze(1).expand(-1, self.blocks // self.copies, *tail).flatten(0, 1)
        return rows.index_select(0, remembered(_rows, self.tied, rows.device))

    def text(self) -> str:
        """As an argument of an operator, which takes no objects."""
        return json.dumps(asdict(self))


def blocks_by(recipes: Sequence[Recipe], skews: Sequence[Tensor]) -> list[Tensor]:
    """Blocks of several skews of one size; those of one formula in one batch."""
    first = recipes[0]
    kinds = {
        (r.parameterization, r.terms, r.block_size, r.coft_eps, s.dtype) for r, s in zip(recipes, skews, strict=True)
    }
    if len(kinds) > 1 or first.coft_eps is not None or len(skews) == 1:
        return [r(s) for r, s in zip(recipes, skews, strict=True)]
    parts = first.formula(torch.cat(list(skews))).split([s.shape[0] for s in skews])
    return [r.spread(p) for r, p in zip(recipes, parts, strict=True)]


@lru_cache(maxsize=1024)
def read_recipe(text: str) -> Recipe:
    """Inverse of `Recipe.text`.

    Raises:
        GuardError: it is none; a program that was exported by another version, or edited, hands such a text on.
    """
    try:
        return made(Recipe, parsed(text))
    except ValueError as error:
        raise GuardError(
            f"a rotation of this program is described by {text[:80]!r}, which cannot be read: {error}. Record or "
            "export the model again"
        ) from None


@lru_cache(maxsize=256)
def _rows(tied: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(tied, device=device)
