"""A stand-in for EETQ's kernel, which is to be had for GPUs only, and its layout step by step in numpy."""

from __future__ import annotations

import types

import numpy as np
import torch

ROWS = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


def permuted(codes):
    """Step 1: the rows of each 16 in the order of ROWS; ``codes (in, out)``."""
    result = np.empty_like(codes)
    for start in range(0, len(codes), 16):
        for row, source in enumerate(ROWS):
            result[start + row] = codes[start + source]
    return result


def interleaved(columns):
    """Step 3: columns ``(out, in)`` in pairs, by turns 64 elements of the one and of the other."""
    out_features, in_features = columns.shape
    result = np.empty(columns.size, dtype=columns.dtype)
    at = 0
    for first in range(0, out_features, 2):
        for start in range(0, in_features, 64):
            for column in (first, first + 1):
                result[at : at + 64] = columns[column, start : start + 64]
                at += 64
    return result


def layout(codes):
    """The bytes that the kernel reads, for codes int8 ``(in, out)``; int8 of the same shape."""
    columns = permuted(codes).T  # step 2
    raw = (interleaved(columns).astype(np.int16) + 128).astype(np.uint8)  # step 4
    swapped = raw.copy()
    swapped[1::4], swapped[2::4] = raw[2::4], raw[1::4]  # step 5
    return swapped.view(np.int8).reshape(codes.shape)


def codes_of(weight):
    """The codes ``(in, out)`` in a weight: by laying out addresses, a byte of them at a time."""
    source = np.arange(weight.size).reshape(weight.shape)
    address = np.zeros(weight.size, dtype=np.int64)
    for shift in (0, 8, 16):
        part = ((source >> shift) & 255).astype(np.uint8)
        laid = layout(part.view(np.int8)).reshape(-1).view(np.uint8) ^ 128  # without step 4
        address |= laid.astype(np.int64) << shift
    codes = np.empty(weight.size, dtype=np.uint8)
    codes[address] = weight.reshape(-1).view(np.uint8) ^ 128
    return codes.view(np.int8).reshape(weight.shape)


def w8_a16_gemm(x, weight, scales):
    """``x @ (q * scale)``; the weight is rounded to the dtype of the scales, the product has that of x."""
    codes = torch.from_numpy(codes_of(weight.detach().numpy()))
    return x @ (codes.to(scales.dtype) * scales.detach()).to(x.dtype)


def install(monkeypatch):
    """Where transformers would put the kernel when it loads an EETQ model."""
    import transformers.integrations.eetq as integration

    monkeypatch.setattr(integration, "eetq_kernels_hub", types.SimpleNamespace(w8_a16_gemm=w8_a16_gemm), raising=False)
