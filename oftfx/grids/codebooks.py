"""Weights as sums of codebook entries: what is stored, the nearest codes, and the best codebooks for given codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_SCORES = 1 << 20  # distances that are held at once; vectors are treated in chunks that keep to it, and to the cache
_SOLVER_STEPS = 15


@dataclass(frozen=True, eq=False)
class Additive:
    """A weight cut into groups of ``og x ig`` elements, each the sum of one entry of every codebook, times a scale.

    ``W[group] = scale[row] * sum_c codebooks[c, codes[row, column, c]]``

    Attributes:
        codes: int32 ``(rows, columns, C)`` of a weight of ``rows * og`` outputs and ``columns * ig`` inputs.
        codebooks: float32 ``(C, k, og, ig)``.
        scales: float32 ``(rows,)``.
        dtype: of the runtime, in which codebooks and scales are stored, sums rounded and scales multiplied.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    dtype: torch.dtype = torch.float32

    def weight(self) -> Tensor:
        """``(out, in)``, float32, the runtime's values to the bit."""
        rows, columns, count = self.codes.shape
        entries = self.codebooks.flatten(2).flatten(0, 1).to(self.dtype)
        first = torch.arange(count, dtype=torch.int32, device=entries.device) * self.codebooks.shape[1]
        # The runtime's own operation: in bfloat16 it rounds ties in its own way.
        sums = torch.nn.functional.embedding_bag(self.codes.flatten(0, 1) + first, entries, mode="sum")
        scaled = sums.view(rows, columns, -1) * self.scales.to(self.dtype).view(-1, 1, 1)
        return ungrouped(scaled.float(), self.codebooks.shape[2:])


def grouped(weight: Tensor, tile: tuple[int, ...]) -> Tensor:
    """A matrix ``(out, in)`` as vectors ``(rows, columns, og * ig)`` of its tiles ``(og, ig)``."""
    high, wide = tile
    return weight.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(2)


def ungrouped(vectors: Tensor, tile: tuple[int, ...]) -> Tensor:
    """The matrix ``(out, in)``; inverse of `grouped`."""
    return vectors.unflatten(2, tuple(tile)).transpose(1, 2).flatten(2).flatten(0, 1)


def decoded(books: Tensor, codes: Tensor) -> Tensor:
    """``sum_c books[c, codes[:, c]]``: vectors ``(m, d)`` for books ``(C, k, d)`` and codes ``(m, C)``."""
    result = books[0][codes[:, 0]]
    for book, code in zip(books[1:], codes.T[1:], strict=True):
        result += book[code]
    return result


def nearest_codes(vectors: Tensor, books: Tensor, codes: Tensor | None = None, *, beam: int = 8) -> Tensor:
    """Codes whose sums are near the vectors: beam search through the books, then each code in turn while it helps.

    Args:
        vectors: ``(m, d)``, float32.
        books: ``(C, k, d)``, float32.
        codes: ``(m, C)`` that are kept for a vector where nothing better is found.
        beam: partial sums that are kept for each vector.

    Returns:
        int32 ``(m, C)``.
    """
    count, size = books.shape[:2]
    beam = min(beam, size ** (count - 1))
    half = books.square().sum(2) / 2  # |v - b|^2 / 2 = |v|^2 / 2 - v b + |b|^2 / 2
    found = torch.empty(len(vectors), count, dtype=torch.int32, device=vectors.device)
    chunk = max(1, _SCORES // (beam * size))
    for part, into in zip(vectors.split(chunk), found.split(chunk), strict=True):
        into.copy_(_improved(part, books, half, _beam_search(part, books, half, beam)))
    if codes is None:
        return found
    better = _missed(vectors, books, found) < _missed(vectors, books, codes)
    return torch.where(better.unsqueeze(1), found, codes)


def _missed(vectors: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    return (vectors - decoded(books, codes)).square_().sum(1)


def _beam_search(vectors: Tensor, books: Tensor, half: Tensor, beam: int) -> Tensor:
    """The best sum after the last book of the ``beam`` best partial sums after every other."""
    count, size, _ = books.shape
    rest = vectors.unsqueeze(1)  # (m, beam, d), what is left of the vector
    left = vectors.new_zeros(len(vectors), 1)  # |rest|^2 / 2 less |vector|^2 / 2
    codes = torch.empty(len(vectors), 1, 0, dtype=torch.int32, device=vectors.device)
    for c in range(count):
        scores = torch.addmm(half[c], rest.flatten(0, 1), books[c].T, alpha=-1).view(*left.shape, size)
        scores += left.unsqueeze(2)
        wide = min(beam, left.shape[1] * size) if c < count - 1 else 1
        left, at = scores.flatten(1).topk(wide, dim=1, largest=False) if wide > 1 else scores.flatten(1).min(1, True)
        parent, code = at // size, at % size
        rest = rest.gather(1, parent.unsqueeze(2).expand(-1, -1, rest.shape[2])) - books[c][code]
        before = codes.gather(1, parent.unsqueeze(2).expand(-1, -1, c))
        codes = torch.cat([before, code.to(torch.int32).unsqueeze(2)], dim=2)
    return codes[:, 0]


def _improved(vectors: Tensor, books: Tensor, half: Tensor, codes: Tensor, sweeps: int = 4) -> Tensor:
    """Each code in turn replaced by the best beside the others, until none changes."""
    if len(books) == 1:
        return codes
    codes = codes.clone()
    rest = vectors - decoded(books, codes)
    for _ in range(sweeps):
        changed = False
        for c, book in enumerate(books):
            rest += book[codes[:, c]]
            code = torch.addmm(half[c], rest, book.T, alpha=-1).argmin(1).to(torch.int32)
            changed |= not torch.equal(code, codes[:, c])
            codes[:, c] = code
            rest -= book[code]
        if not changed:
            break
    return codes


def solved_books(
    vectors: Tensor,
    codes: Tensor,
    scales: Tensor,
    books: Tensor,
    metric: Callable[[Tensor], Tensor] = lambda error: error,
) -> Tensor:
    """Codebooks for given codes and scales: ``argmin |vectors - scales * sum_c books[c, codes[c]]|^2``.

    By conjugate gradients from the given books, which takes no matrix of all entries by all entries. Entries that no
    code uses stay as they are.

    Args:
        vectors: ``(m, d)``, float32, not divided by scales.
        codes: ``(m, C)``, int.
        scales: ``(m, 1)``.
        books: ``(C, k, d)`` to start from.
        metric: the symmetric operator of another squared error ``<error, metric(error)>``, on ``(m, d)``.

    Returns:
        ``(C, k, d)``; never worse than ``books`` but for rounding.
    """
    count, size, length = books.shape
    flat = (codes + size * torch.arange(count, dtype=codes.dtype, device=codes.device)).T.contiguous()

    def gather(entries: Tensor) -> Tensor:
        return decoded(entries, codes) * scales

    def scatter(error: Tensor) -> Tensor:
        result = books.new_zeros(count * size, length)
        for index in flat:
            result.index_add_(0, index, error * scales)
        return result.view_as(books)

    used = books.new_zeros(count * size)
    for index in flat:
        used.index_add_(0, index, scales.square().flatten())
    precondition = torch.where(used > 0, 1 / used.clamp(min=1e-30), 0).view(count, size, 1)
    books = books.clone()
    residual = scatter(metric(vectors - gather(books)))
    energy = (residual * residual * precondition).sum()
    # Below this the residual is rounding: of what it would be from codebooks of zeros.
    floor = 1e-12 * (scatter(metric(vectors)).square() * precondition).sum()
    direction = residual * precondition
    for _ in range(_SOLVER_STEPS):
        moved = scatter(metric(gather(direction)))
        curvature = (direction * moved).sum()
        if not (energy > floor and curvature > 0):
            break
        books += energy / curvature * direction
        residual -= energy / curvature * moved
        after = (residual * residual * precondition).sum()
        direction = residual * precondition + after / energy * direction
        energy = after
    return books
