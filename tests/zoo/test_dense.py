"""The reference that the zoo is held against, itself held against the definition: rotate the input, then the layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.reference import dense_rotation, rel
from tests.zoo.dense import rotated, rotation


@pytest.fixture
def make():
    def rotation_of(blocks, size):
        return rotation(0.1 * torch.randn(blocks, size * (size - 1) // 2, dtype=torch.float64), size)

    return rotation_of


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_rotation_is_the_one_written_out_entry_by_entry():
    skew = 0.1 * normal(3, 6)
    assert rel(rotation(skew, 4), dense_rotation(skew, 4)) < 1e-14
    assert torch.equal(rotation(normal(5, 0), 1), torch.eye(5, dtype=torch.float64))


def test_matrices(make):
    x, weight, r = normal(7, 12), normal(5, 12), make(3, 4)
    expected = (x @ r) @ weight.T
    assert rel(x @ rotated(weight, r, "linear").T, expected) < 1e-14
    assert rel(x @ rotated(weight, r, "functional").T, expected) < 1e-14
    assert rel(x @ rotated(weight.T, r, "conv1d_gpt2"), expected) < 1e-14
    assert rel(x @ rotated(weight.T, r, "functional", transposed=True), expected) < 1e-14


def test_experts(make):
    x, weight, r = normal(3, 7, 12), normal(3, 5, 12), make(3, 4)
    expected = (x @ r) @ weight.mT
    assert rel(x @ rotated(weight, r, "experts").mT, expected) < 1e-14
    assert rel(x @ rotated(weight.mT, r, "experts", transposed=True), expected) < 1e-14


def test_embedding(make):
    table, r, ids = normal(9, 12), make(3, 4), torch.tensor([[1, 8], [0, 1]])
    assert rel(F.embedding(ids, rotated(table, r, "embedding")), F.embedding(ids, table) @ r) < 1e-14


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_rotates_its_patches(make, groups):
    x, weight, r = normal(2, 4 * groups, 6, 5), normal(6, 4, 3, 2), make(6, 4)
    expected = []
    for part, rows in zip(x.chunk(groups, 1), weight.chunk(groups), strict=True):
        patches = F.unfold(part, (3, 2))  # (batch, channels * 3 * 2, positions)
        expected.append(rows.flatten(1) @ r.T @ patches)
    got = F.conv2d(x, rotated(weight, r, "conv2d"), groups=groups)
    assert rel(got.flatten(2), torch.cat(expected, 1)) < 1e-14


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_rotates_its_channels(make, groups):
    x, weight, r = normal(2, 8 * groups, 6, 5), normal(8 * groups, 3, 2, 2), make(2, 4)
    turned = torch.cat([torch.einsum("nchw,cd->ndhw", part, r) for part in x.chunk(groups, 1)], 1)
    expected = F.conv_transpose2d(turned, weight, stride=2, groups=groups)
    got = F.conv_transpose2d(x, rotated(weight, r, "conv_transpose", groups=groups), stride=2, groups=groups)
    assert rel(got, expected) < 1e-14
