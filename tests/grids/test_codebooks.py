import itertools

import pytest
import torch

from oftfx.grids.codebook_compensate import _loss, _spread, _swept, compensated_sums
from oftfx.grids.codebook_fit import fitted, relearned
from oftfx.grids.codebooks import Additive, grouped, nearest_codes, solved_books, ungrouped
from tests.reference import rel


def every_sum(books):
    """All combinations of codes and their sums, in float64."""
    codes = torch.tensor(list(itertools.product(range(books.shape[1]), repeat=len(books))))
    return codes, sum(books[c].double()[codes[:, c]] for c in range(len(books)))


@pytest.mark.parametrize("size", [(1, 32, 5), (2, 8, 4), (3, 3, 2)], ids=str)
def test_a_beam_that_holds_every_partial_sum_finds_the_nearest(size):
    vectors, books = torch.randn(200, size[2]), torch.randn(size)
    codes, sums = every_sum(books)
    best = torch.cdist(vectors.double(), sums).min(1)
    found = nearest_codes(vectors, books, beam=size[1] ** (size[0] - 1))
    assert torch.equal(found.long(), codes[best.indices])


def test_a_narrow_beam_comes_near_it_and_given_codes_never_get_worse():
    vectors, books = torch.randn(500, 4), torch.randn(3, 16, 4)
    books *= torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)  # each for what those before leave
    best = torch.cdist(vectors.double(), every_sum(books)[1]).min(1).values

    def missed(codes):
        return (vectors - sum(books[c][codes[:, c]] for c in range(3))).norm(dim=1)

    one, eight = (missed(nearest_codes(vectors, books, beam=b)) for b in (1, 8))
    least = best.square().sum()
    assert eight.square().sum() < 1.002 * least  # measured 1.0002
    assert one.square().sum() > 1.1 * least
    start = torch.randint(16, (500, 3), dtype=torch.int32)
    start[::2] = nearest_codes(vectors[::2], books, beam=64)
    kept = nearest_codes(vectors, books, start, beam=1)
    assert (missed(kept) <= missed(start)).all()
    assert torch.equal(kept[::2], start[::2])
    assert not torch.equal(kept[1::2], start[1::2])


def test_chunks_change_nothing(monkeypatch):
    vectors, books = torch.randn(300, 4), torch.randn(2, 16, 4)
    whole = nearest_codes(vectors, books)
    monkeypatch.setattr("oftfx.grids.codebooks._SCORES", 16 * 8 * 7)
    assert torch.equal(nearest_codes(vectors, books), whole)
    assert nearest_codes(vectors[:0], books).shape == (0, 2)


def design(codes, size):
    """One column an entry."""
    rows = torch.zeros(len(codes), codes.shape[1] * size, dtype=torch.float64)
    for c in range(codes.shape[1]):
        rows[torch.arange(len(codes)), c * size + codes[:, c].long()] = 1
    return rows


def test_codebooks_by_conjugate_gradients_are_the_least_squares_ones():
    vectors, scales = torch.randn(400, 3), torch.rand(400, 1) + 0.5
    codes = torch.randint(6, (400, 2), dtype=torch.int32)
    start = torch.randn(2, 8, 3)  # two entries of each are not used
    books = solved_books(vectors, codes, scales, start)
    a = design(codes, 8) * scales
    expected = torch.linalg.pinv(a) @ vectors.double()
    assert rel(a @ books.double().flatten(0, 1), a @ expected) < 1e-5
    assert torch.equal(books[:, 6:], start[:, 6:])


@pytest.mark.parametrize("tile", [(1, 4), (2, 3)], ids=str)
def test_codebooks_and_scales_under_moments_against_dense_algebra(tile):
    high, wide = tile
    rows, columns = 10 * high, 4 * wide
    weight, x = torch.randn(rows, columns), torch.randn(60, columns)
    moments = x.T @ x / 60 + 0.1 * torch.eye(columns)
    codes = torch.randint(5, (10, 4, 2), dtype=torch.int32)
    start = Additive(codes, torch.randn(2, 5, *tile), torch.rand(10) + 0.5)
    found = relearned(grouped(weight, tile), start, moments)
    # The weight is linear in the entries: its derivatives as a matrix, and the loss through a square root of moments.
    entries = torch.eye(2 * 5 * high * wide).view(-1, 2, 5, *tile)
    columns_of = torch.stack([Additive(codes, e, start.scales).weight() for e in entries]).double()
    root = torch.linalg.cholesky(moments.double())
    a, b = (columns_of @ root).flatten(1).T, (weight.double() @ root).flatten()
    best = (torch.linalg.pinv(a) @ b).view(2, 5, *tile).float()
    dense = Additive(codes, best, start.scales)
    mine = Additive(codes, found.codebooks, start.scales)
    assert _loss(weight, mine, moments) <= _loss(weight, dense, moments) * (1 + 1e-3)
    least = _loss(weight, found, moments)
    assert least < _loss(weight, mine, moments)
    for factor in (0.99, 1.01):
        other = Additive(codes, found.codebooks, found.scales * factor)
        assert least < _loss(weight, other, moments)


def test_tiles_of_a_matrix():
    weight = torch.arange(24.0).view(4, 6)
    assert torch.equal(grouped(weight, (2, 3))[1, 0], torch.tensor([12.0, 13, 14, 18, 19, 20]))
    assert torch.equal(ungrouped(grouped(weight, (2, 3)), (2, 3)), weight)


def test_a_sweep_lessens_the_loss_and_so_does_the_whole():
    weight, x = torch.randn(64, 96), torch.randn(500, 96) @ (torch.randn(96, 96) / torch.arange(1, 97).sqrt())
    moments = x.T @ x / 500 + 0.1 * torch.eye(96)
    start = fitted(weight, (2, 32, 1, 4), torch.float32)
    spread = _spread(weight, start, moments)
    losses = [_loss(weight, f, moments) for f in (start, spread, _swept(weight, spread, moments))]
    assert losses[0] > losses[1] > losses[2]
    assert _loss(weight, _swept(weight, start, moments), moments) < losses[0]
    final = compensated_sums(weight, start, 1000 * moments)  # any positive multiple
    assert _loss(weight, final, moments) < losses[2]


def test_learning_from_a_part_of_the_rows(monkeypatch):
    """A large weight: codebooks of a sample of rows, all of them coded."""
    weight = torch.randn(256, 64) * (torch.rand(256, 1) + 0.2)
    whole = rel(fitted(weight, (2, 32, 1, 4), torch.float32).weight(), weight)
    monkeypatch.setattr("oftfx.grids.codebook_fit._LEARNED", 1024)  # of 4096 vectors
    part = fitted(weight, (2, 32, 1, 4), torch.float32)
    assert part.codes.shape == (256, 16, 2)
    assert rel(part.weight(), weight) < 1.05 * whole
    again = fitted(weight, (2, 32, 1, 4), torch.float32, part)
    assert rel(again.weight(), weight) <= rel(part.weight(), weight)


def test_more_entries_than_vectors_store_them_all():
    weight = torch.randn(8, 16)
    assert rel(fitted(weight, (1, 256, 1, 4), torch.float32).weight(), weight) < 1e-6
