"""Block-diagonal products and series in float64, dense and from their definitions."""

import torch

from tests.reference import dense_skew


def dense_products(x, blocks):
    """``x @ blockdiag(R_i)`` for blocks side by side."""
    groups, size, width = blocks.shape
    flat, blocks = x.double().reshape(-1, groups * size), blocks.double()
    each = [torch.block_diag(*blocks[:, :, i : i + size]) for i in range(0, width, size)]
    return [(flat @ r).reshape(x.shape) for r in each]


def dense_series(skew, size, double, single):
    """``I + 2Q + ... + 2Q^double (+ Q^(double+1))`` by explicit powers."""
    powers = [2] * double + [1] * single
    found = []
    for row in skew.detach():
        q, eye = dense_skew(row, size), torch.eye(size, dtype=torch.float64)
        found.append(eye + sum(f * torch.linalg.matrix_power(q, p + 1) for p, f in enumerate(powers)))
    return torch.stack(found)
