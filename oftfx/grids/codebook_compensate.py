"""Error-compensated rounding to sums of codebook entries: whole groups of columns at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from oftfx.grids.codebook_fit import relearned
from oftfx.grids.codebooks import Additive, decoded, grouped, nearest_codes
from oftfx.grids.compensate import inverse_factor

_ROUNDS = 4


@torch.no_grad()
def compensated_sums(weight: Tensor, start: Additive, moments: Tensor, *, damping: float = 0.01) -> Additive:
    """Codes, codebooks and scales that keep what the layer computes: small ``|X (Q - W)^T|`` for ``moments = X^T X``.

    The columns are coded group after group, those with the largest inputs first. A group's codes are the nearest in
    the error that remains once the columns still to be coded make up for it, and these are then changed to do so (the
    vector case of `oftfx.grids.compensated`). After that codebooks and scales by least squares and, group by group,
    the best codes beside all others follow each other; each lessens the error.

    Args:
        weight: float32 ``(out, in)``.
        start: codebooks and scales to begin with.
        moments: second moments of the layer's inputs, ``(in, in)``, or any positive multiple of them.
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        The best that was met, ``start`` included.

    Source: Frantar et al., GPTQ, arXiv 2210.17323; Egiazarian et al., AQLM, arXiv 2401.06118.
    """
    moments = moments.float()
    mean = moments.diagonal().mean()
    if not mean > 0:  # the layer has only seen zeros
        return start
    damped = moments / mean
    damped.diagonal().add_(damping)
    vectors = grouped(weight, start.codebooks.shape[2:])
    found = _spread(weight, start, damped)
    best, least = min(((f, _loss(weight, f, damped)) for f in (start, found)), key=lambda pair: pair[1])
    for _ in range(_ROUNDS):
        found = _swept(weight, relearned(vectors, found, damped), damped)
        loss = _loss(weight, found, damped)
        if loss < least:
            best, least = found, loss
    return best


def _spread(weight: Tensor, start: Additive, moments: Tensor) -> Additive:
    """Codes of one group of columns after another, the error of each spread over the columns still to come."""
    wide = start.codebooks.shape[3]
    tiles = torch.argsort(moments.diagonal().view(-1, wide).mean(1), descending=True)
    order = (tiles.unsqueeze(1) * wide + torch.arange(wide, device=tiles.device)).flatten()
    upper = inverse_factor(moments, 0.0, order)
    rest = weight[:, order]
    codes = torch.empty_like(start.codes)
    for i, tile in enumerate(tiles.tolist()):
        first, last = i * wide, (i + 1) * wide
        # |error @ inverse|^2 is the group's share of the loss when all later columns make up for it.
        inverse = torch.linalg.inv(upper[first:last, first:last])
        codes[:, tile], values = _best(rest[:, first:last], start, inverse)
        rest[:, last:] -= ((rest[:, first:last] - values) @ inverse) @ upper[first:last, last:]
    return replace(start, codes=codes)


def _swept(weight: Tensor, start: Additive, moments: Tensor) -> Additive:
    """The best codes of each group of columns beside all the others, in turn."""
    wide = start.codebooks.shape[3]
    codes, missed = start.codes.clone(), weight - start.weight()
    for tile in range(codes.shape[1]):
        at = slice(tile * wide, (tile + 1) * wide)
        own = moments[at, at]
        lower = torch.linalg.cholesky(own)
        # What the group would have to be to make up for the errors of all others.
        pull = missed @ moments[:, at] - missed[:, at] @ own
        wanted = weight[:, at] + torch.cholesky_solve(pull.T, lower).T
        codes[:, tile], values = _best(wanted, start, lower, codes[:, tile])
        missed[:, at] = weight[:, at] - values
    return replace(start, codes=codes)


def _best(wanted: Tensor, found: Additive, factor: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of one group of columns, near in ``|error @ factor|^2``.

    Args:
        wanted: ``(out, ig)``.
        found: its codebooks and scales are used.
        factor: ``(ig, ig)``.
        codes: ``(rows, C)`` to keep where nothing better is found.

    Returns:
        Codes ``(rows, C)`` and their values ``(out, ig)``.
    """
    books = found.codebooks
    inverse = torch.where(found.scales == 0, 0, 1 / found.scales)
    scaled = wanted.view(len(inverse), *books.shape[2:]) * inverse.view(-1, 1, 1)
    codes = nearest_codes((scaled @ factor).flatten(1), (books @ factor).flatten(2), codes)
    values = decoded(books.flatten(2), codes) * found.scales.unsqueeze(1)
    return codes, values.view(wanted.shape)


def _loss(weight: Tensor, found: Additive, moments: Tensor) -> float:
    missed = weight - found.weight()
    return float(((missed @ moments) * missed).sum(dtype=torch.float64))
