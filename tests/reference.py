"""Independent references: float64, dense, written from the definitions and sharing no code with the library."""

from __future__ import annotations

import torch


def rel(got, expected):
    """Relative Frobenius error in float64."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def dense_skew(vector, size):
    """Q for one block: filled entry by entry from the strictly upper triangle, row by row."""
    q = torch.zeros(size, size, dtype=torch.float64)
    values = iter(vector.double().tolist())
    for row in range(size):
        for column in range(row + 1, size):
            value = next(values)
            q[row, column], q[column, row] = value, -value
    return q


def dense_block(vector, size, parameterization="cayley_neumann", terms=5):
    """R for one block, by explicit powers or an explicit inverse."""
    q, eye = dense_skew(vector, size), torch.eye(size, dtype=torch.float64)
    if parameterization == "cayley":
        return (eye - q) @ torch.linalg.inv(eye + q)
    if parameterization == "cayley_neumann_016":
        return eye + 2 * sum((torch.linalg.matrix_power(q, p) for p in range(1, terms)), torch.zeros_like(q))
    result = eye.clone()
    if terms == 2:
        return result + 2 * q
    if terms > 2:
        last = max(3, terms - 1)
        for power in range(1, last):
            result += 2 * torch.linalg.matrix_power(q, power)
        result += torch.linalg.matrix_power(q, last)
    return result


def dense_rotation(skew, size, blocks=None, **kwargs):
    """The whole ``(n, n)`` rotation; one row of ``skew`` repeated where the blocks share it."""
    rows = [skew[i if skew.shape[0] > 1 else 0] for i in range(blocks or skew.shape[0])]
    return torch.block_diag(*(dense_block(r, size, **kwargs) for r in rows))


def randomize(model, std=0.05, seed=0):
    """Give every rotation of a transformed model random values."""
    import oftfx

    generator = torch.Generator().manual_seed(seed)
    for parameter in oftfx.adapter_parameters(model):
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model
