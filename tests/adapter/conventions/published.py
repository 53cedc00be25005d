"""What other tools compute, in float64 from the published definitions, element by element where that is simple."""

import json
import math

import torch
from safetensors.torch import save_file

EYE = torch.eye


def skew_full(a):
    """``A - A^T`` of full blocks."""
    return a.double() - a.double().transpose(-1, -2)


def skew_upper(rows, size):
    """The same of an upper triangle, row by row."""
    q = torch.zeros(len(rows), size, size, dtype=torch.float64)
    for block, values in enumerate(rows.double()):
        position = 0
        for i in range(size):
            for j in range(i + 1, size):
                q[block, i, j], q[block, j, i] = values[position], -values[position]
                position += 1
    return q


def rotated_outputs(weight, q):
    """kohya's networks.oft, LyCORIS and ComfyUI: ``R = (I + Q)(I - Q)^-1``, ``W'[k, m] = sum_n R[k, n, m] W[k, n]``."""
    blocks, size, _ = q.shape
    r = (EYE(size).double() + q) @ torch.linalg.inv(EYE(size).double() - q)
    return torch.einsum("knm,kni->kmi", r, weight.reshape(blocks, size, -1)).reshape(weight.shape)


def kohya(weight, a, alpha):
    q, bound = skew_full(a), alpha * len(weight)
    norm = float(q.norm())
    return rotated_outputs(weight, q * (min(norm, bound) + 1e-8) / (norm + 1e-8))


def comfyui(weight, a, alpha):
    q = skew_full(a)
    norm = float(q.norm()) + 1e-8
    return rotated_outputs(weight, q * alpha / norm if 0 < alpha < norm else q)


def series(q):
    """``I + 2Q + 2Q^2 + 2Q^3 + Q^4``: five terms of OneTrainer, sd-scripts and PEFT >= 0.18."""
    power = torch.linalg.matrix_power
    return EYE(q.shape[-1]).double() + 2 * q + 2 * power(q, 2) + 2 * power(q, 3) + power(q, 4)


def oft_v2(weight, rows, size, *, convolution, scaled=False):
    """Inputs are rotated: of Linear ``(x R) W^T``; of Conv2d, the weight, ``W R`` on flattened patches."""
    rows = rows / (2 * math.sqrt(size - 1)) if scaled else rows
    r = series(skew_upper(rows, size))
    blocks = weight.shape[1] // size
    r = r.expand(blocks, size, size) if len(r) == 1 else r
    whole = torch.block_diag(*r)
    return weight @ whole if convolution else weight @ whole.T


def sd_scripts_boft(weight, factors, scale):
    """networks.boft: ``P_i D_i P_i^T``, of half blocks with even numbers first, then odd ones; scales of rows."""
    count, blocks, size, _ = factors.shape
    n = blocks * size
    product = EYE(n).double()
    for i in range(count):
        q = (factors[i].double() - factors[i].double().transpose(1, 2)) / 2
        inverse = torch.linalg.inv(EYE(size).double() + q)
        d = torch.block_diag(*((EYE(size).double() - q) @ inverse))
        p = torch.zeros(n, n, dtype=torch.float64)
        group, half = n // (blocks // 2**i), max(size // 2, 1)
        for start in range(0, n, group):
            parts = list(range(group // half))
            order = (
                [part * half + k for part in parts[::2] + parts[1::2] for k in range(half)]
                if count > 1
                else range(group)
            )
            for row, column in enumerate(order):
                p[start + row, start + column] = 1
        product = p @ d @ p.T @ product
    return scale.reshape(-1, 1) * (weight @ product.T)


def write(path, tensors, **notes):
    """A safetensors file with metadata."""
    made = {k: (v if isinstance(v, torch.Tensor) else torch.tensor(v)).clone().contiguous() for k, v in tensors.items()}
    save_file(made, path, {k: v if isinstance(v, str) else json.dumps(v) for k, v in notes.items()} or None)
    return path
