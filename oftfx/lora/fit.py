"""The best low-rank approximations of an update, of every rank at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGE = 1e-6
"""Share of the mean of the second moments that is added to each: what no input shows is dropped first, not always."""
_NOTHING = 1e-14
"""Of the largest energy: what is smaller comes of rounding the update."""
_SOME = 2**24
"""Elements to widen at a time."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Approximations ``B A`` of ``D (out, in)`` that keep most of ``|X D^T|``, from one eigendecomposition in float64.

    With ``C = X^T X`` and the eigenvectors U of ``D C D^T``, the best approximation of rank r is ``U_r U_r^T D``: a
    projection, so what is kept and what is lost are orthogonal. Where the input is the shorter side, the same comes of
    ``S^T D^T D S`` with ``S S^T = C``.

    Attributes:
        update: ``D``.
        energies: ``|X d_i|^2`` of each direction, descending, float64; ``min(out, in)`` of them.
        vectors: their directions: of the output ``(out, k)``, or of the whitened input ``(in, k)``.
        root: ``S`` and its inverse where the input is the shorter side and its moments are known.

    Source: Eckart and Young (1936); weighted by activations: SVD-LLM, arXiv 2403.07378.
    """

    update: Tensor
    energies: Tensor
    vectors: Tensor
    root: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, update: Tensor, moments: Tensor | None = None) -> Fit:
        """Decompose.

        Args:
            update: ``(out, in)``, float32 or float64.
            moments: ``X^T X (in, in)``, or its diagonal ``(in,)``, float64; None where inputs of all directions count
                alike.
        """
        rows, columns = update.shape
        if moments is not None:
            moments = raised(moments)
        if rows <= columns:
            energies, vectors = _descending(gram_of(update, moments))
            return cls(update, energies, vectors)
        root = None if moments is None else _root(moments)
        inner = gram_of(update.T, None)
        energies, vectors = _descending(inner if root is None else root[0].T @ inner @ root[0])
        return cls(update, energies, vectors, root)

    @property
    def full(self) -> int:
        """The rank of the update, as far as its digits go."""
        return rank_for(self.energies, 0.0)

    def loss(self, rank: int) -> float:
        """Share of the energy that an approximation of this rank loses."""
        whole = float(self.energies.sum())
        return float(self.energies[rank:].sum()) / whole if whole else 0.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``A (rank, in)`` and ``B (out, rank)``, their rows and columns of equal norms; zeros beyond the full rank."""
        chosen = self.vectors[:, : min(rank, self.full)]
        if self.update.shape[0] <= self.update.shape[1]:
            b, a = chosen, _product(self.update.T, chosen).T
        else:
            inside, back = (chosen, chosen) if self.root is None else (self.root[0] @ chosen, self.root[1].T @ chosen)
            b, a = _product(self.update, inside), back.T
        share = (b.norm(dim=0) / a.norm(dim=1).clamp(min=1e-300)).sqrt().clamp(min=1e-150)
        a, b = a * share.unsqueeze(1), b / share
        missing = rank - chosen.shape[1]
        return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))


def rank_for(energies: Tensor, loss: float) -> int:
    """The smallest rank that loses no more than this share of energies, which descend; rounding does not count."""
    if not len(energies):
        return 0
    lost = energies.flip(0).cumsum(0).flip(0)  # of the ranks 0, 1, ...
    full = int((energies > _NOTHING * energies[0]).sum())
    return min(full, int((lost > loss * lost[0]).sum()))


def gram_of(update: Tensor, moments: Tensor | None) -> Tensor:
    """``D C D^T (out, out)`` in float64, for C the identity, a diagonal or a matrix."""
    rows, columns = update.shape
    total = update.new_zeros(rows, rows, dtype=torch.float64)
    some = max(1, _SOME // max(1, rows))
    for start in range(0, columns, some):
        part = update[:, start : start + some].double()
        if moments is None:
            total.addmm_(part, part.T)
        elif moments.dim() == 1:
            total.addmm_(part * moments[start : start + some], part.T)
        else:
            total.addmm_(_product(update, moments[:, start : start + some]), part.T)
    return total


def energy_of(weight: Tensor, moments: Tensor | None) -> float:
    """``|X W^T|^2``; of ``|W|^2`` without moments."""
    total, some = 0.0, max(1, _SOME // weight.shape[1])
    for part in weight.split(some):
        wide = part.double()
        seen = wide if moments is None else wide * moments if moments.dim() == 1 else wide @ moments
        total += float((seen * wide).sum())
    return total


def raised(moments: Tensor) -> Tensor:
    """Second moments, or their diagonal, with a small share of their mean added."""
    if moments.dim() == 1:
        return moments + _RIDGE * moments.mean()
    result = moments.clone()
    result.diagonal().add_(_RIDGE * float(moments.diagonal().mean()))
    return result


def _root(moments: Tensor) -> tuple[Tensor, Tensor]:
    """``S`` with ``S S^T = C``, and its inverse."""
    if moments.dim() == 1:
        return torch.diag(moments.sqrt()), torch.diag(moments.rsqrt())
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=float(values[-1]) * 1e-15).sqrt()
    return vectors * values, (vectors / values).T


def _descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _product(matrix: Tensor, right: Tensor) -> Tensor:
    """In float64, some rows at a time."""
    some = max(1, _SOME // max(1, matrix.shape[1]))
    return torch.cat([part.double() @ right for part in matrix.split(some)])
