"""Codebooks, codes and scales for a weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from oftfx.grids.codebooks import Additive, decoded, grouped, nearest_codes, solved_books

_LEARNED = 1 << 16  # vectors that codebooks are learned from, at least 16 an entry; the others are coded with them
_MEANS, _ROUNDS, _TRIED, _WORTH = 10, 10, 2, 4e-3


@torch.no_grad()
def fitted(
    weight: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype, start: Additive | None = None
) -> Additive:
    """Codebooks, codes and scales with a small squared error ``|weight - Q|^2``.

    Each codebook begins as k-means of what those before it left; those of ``start`` are tried as well. Then
    least-squares codebooks for the codes, least-squares scales and the nearest codes follow each other. The same
    arguments give the same result, whatever the state of torch's random generators.

    Args:
        weight: float32 ``(out, in)``.
        shape: of the codebooks, ``(C, k, og, ig)``.
        dtype: in which codebooks and scales will be stored.
        start: codes that a group keeps while its weights equal theirs and its codebooks stay.

    Returns:
        The best that was met, ``start`` with its unchanged groups included.
    """
    vectors = grouped(weight, shape[2:])
    rows, columns, _ = vectors.shape
    generator = torch.Generator().manual_seed(0)
    learned = max(1, max(_LEARNED, 16 * shape[1]) // columns)
    some = torch.randperm(rows, generator=generator)[:learned].sort().values.to(weight.device)
    scales = _stored(vectors.square().mean((1, 2)).sqrt(), dtype)
    books = _means(_scaled(vectors[some], scales[some]), *shape[:2], generator).view(shape)
    none = torch.empty(0, columns, shape[0], dtype=torch.int32, device=weight.device)
    new = Additive(none, _stored(books, dtype), scales, dtype)
    if learned < rows:
        part = _refined(vectors[some], _coded(vectors[some], replace(new, scales=scales[some])), _ROUNDS)
        new = replace(new, codebooks=part.codebooks)
    found = _refined(vectors, _coded(vectors, new), _TRIED)
    if start is not None:
        same = (vectors == grouped(start.weight(), shape[2:])).all(dim=2, keepdim=True)
        kept = replace(start, codes=torch.where(same, start.codes, _coded(vectors, start).codes))
        found = min(_refined(vectors, kept, _TRIED), found, key=lambda trial: _error(vectors, trial))
    return found if learned < rows else _refined(vectors, found, _ROUNDS)


def _refined(vectors: Tensor, found: Additive, rounds: int) -> Additive:
    """Least-squares codebooks and scales, then codes, in turn, while that is worth it."""
    best, least = found, _error(vectors, found)
    for _ in range(rounds):
        found = _coded(vectors, relearned(vectors, found))
        error = _error(vectors, found)
        if not error < least:
            break
        slow = error > (1 - _WORTH) * least
        best, least = found, error
        if slow:
            break
    return best


def relearned(vectors: Tensor, found: Additive, moments: Tensor | None = None) -> Additive:
    """Least-squares codebooks, then scales, for the codes as they are.

    Args:
        vectors: the weight, ``(rows, columns, og * ig)``; see `oftfx.grids.codebooks.grouped`.
        found: codes, and codebooks and scales to start from.
        moments: ``(in, in)``, to make ``tr(E moments E^T)`` small for the error ``E (out, in)`` rather than ``|E|^2``.
    """
    rows, columns, length = vectors.shape
    wide = found.codebooks.shape[3]

    def metric(error: Tensor) -> Tensor:
        if moments is None:
            return error
        tiles = error.view(rows, columns, -1, wide).transpose(1, 2)  # (rows, og, columns, ig)
        return (tiles.flatten(2) @ moments).view_as(tiles).transpose(1, 2).reshape(error.shape)

    codes, flat = found.codes.flatten(0, 1), vectors.reshape(-1, length)
    each = found.scales.repeat_interleave(columns).unsqueeze(1)
    books = solved_books(flat, codes, each, found.codebooks.flatten(2), metric)
    books = _stored(books, found.dtype)
    sums = decoded(books, codes)
    counted = metric(sums)
    squares = (sums * counted).view(rows, -1).sum(1)
    scales = (flat * counted).view(rows, -1).sum(1) / squares
    scales = _stored(torch.where(squares > 0, scales, found.scales), found.dtype)
    return replace(found, codebooks=books.view_as(found.codebooks), scales=scales)


def _coded(vectors: Tensor, found: Additive) -> Additive:
    """With the nearest codes; those it has are kept where nothing better is found."""
    old = found.codes.flatten(0, 1) if len(found.codes) else None
    codes = nearest_codes(_scaled(vectors, found.scales), found.codebooks.flatten(2), old)
    return replace(found, codes=codes.view(*vectors.shape[:2], -1))


def _scaled(vectors: Tensor, scales: Tensor) -> Tensor:
    """Vectors divided by the scale of their row, ``(m, d)``; a row under a scale of zero is zero."""
    inverse = torch.where(scales == 0, 0, 1 / scales)
    return (vectors * inverse.view(-1, 1, 1)).flatten(0, 1)


def _error(vectors: Tensor, found: Additive) -> float:
    sums = decoded(found.codebooks.flatten(2), found.codes.flatten(0, 1)).view_as(vectors)
    return float((vectors - sums * found.scales.view(-1, 1, 1)).square().sum(dtype=torch.float64))


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).float()


def _means(vectors: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """``count`` codebooks ``(C, k, d)``: means of the vectors, of what those left, and so on."""
    books, rest = [], vectors
    for _ in range(count):
        books.append(_clusters(rest, size, generator))
        rest = rest - books[-1][_cluster_of(rest, books[-1])]
    return torch.stack(books)


def _clusters(vectors: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """k-means ``(k, d)``; a mean without vectors moves to the vector that is farthest from its own."""
    first = torch.randperm(len(vectors), generator=generator)[:size].to(vectors.device)
    means = torch.nn.functional.pad(vectors[first], (0, 0, 0, size - len(first)))
    before = None
    for _ in range(_MEANS):
        at = _cluster_of(vectors, means)
        if before is not None and torch.equal(at, before):
            break
        before = at
        members = torch.bincount(at, minlength=size)
        sums = torch.zeros_like(means).index_add_(0, at, vectors)
        means = torch.where(members.unsqueeze(1) > 0, sums / members.clamp(min=1).unsqueeze(1), means)
        empty = (members == 0).nonzero().flatten()
        far = (vectors - means[at]).square().sum(1).topk(min(len(empty), len(vectors))).indices
        means[empty[: len(far)]] = vectors[far]
    return means


def _cluster_of(vectors: Tensor, means: Tensor) -> Tensor:
    return nearest_codes(vectors, means.unsqueeze(0))[:, 0].long()
