"""Rotated layers in float64, from the definition: the *input* is rotated densely, the weight stays as it is.

``R`` is a dense ``(n, n)`` matrix (`tests.reference.dense_rotation`). Nothing here uses the library or a layer's own
forward; a convolution is a matrix product of its patches.
"""

from __future__ import annotations

import torch


def clipped(skew, eps):
    """COFT: every row of skew ``(blocks, b (b - 1) / 2)`` with ``|Q|_F`` cut to ``eps / sqrt(blocks)``."""
    skew = skew.detach().double()
    limit, norm = eps / skew.shape[0] ** 0.5, 2**0.5 * skew.norm(dim=1, keepdim=True)
    return torch.where(norm > limit, skew * limit / norm, skew)


def dense_linear(layer, rotation, x):
    """``x R W^T + bias`` of a Linear, or of GPT-2's Conv1D, which stores ``W^T``."""
    weight = layer.weight.detach().double()
    if type(layer).__name__ != "Conv1D":
        weight = weight.T
    return x.double() @ rotation @ weight + (0 if layer.bias is None else layer.bias.detach().double())


def dense_embedding(layer, rotation, ids):
    """``E[ids] R``."""
    return layer.weight.detach().double()[ids] @ rotation


def dense_conv2d(layer, rotation, x):
    """Pad, cut into patches ``(channels * kh * kw)``, rotate every patch, multiply by the flattened weight.

    A rotation as long as the patch of one group acts on each group; one as long as the whole patch on all channels.
    """
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    batched, weight = batched.detach().double(), layer.weight.detach().double()
    padded = _padded(batched, layer)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    pieces = [
        padded[:, :, i * dh : i * dh + sh * (height - 1) + 1 : sh, j * dw : j * dw + sw * (width - 1) + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    patches = torch.stack(pieces, 2).flatten(1, 2).permute(0, 2, 3, 1)  # (batch, height, width, channels * kh * kw)
    if rotation.shape[0] == patches.shape[-1]:
        patches, rotation = patches @ rotation, None
    results = []
    for part, rows in zip(patches.chunk(layer.groups, -1), weight.flatten(1).chunk(layer.groups), strict=True):
        results.append((part if rotation is None else part @ rotation) @ rows.T)
    result = torch.cat(results, -1)
    if layer.bias is not None:
        result = result + layer.bias.detach().double()
    result = result.permute(0, 3, 1, 2)
    return result if x.dim() == 4 else result.squeeze(0)


def _padded(x, layer):
    """By indices for every padding mode: which row and column stands where."""
    (top, left), mode = layer.padding, layer.padding_mode
    for axis, width in ((2, top), (3, left)):
        size = x.shape[axis]
        where = torch.arange(-width, size + width)
        if mode == "zeros":
            inside = ((where >= 0) & (where < size)).double()
            shape = [1, 1, 1, 1]
            shape[axis] = -1
            x = x.index_select(axis, where.clamp(0, size - 1)) * inside.view(shape)
            continue
        if mode == "reflect":
            where = where.abs()
            where = torch.where(where >= size, 2 * (size - 1) - where, where)
        elif mode == "circular":
            where = where % size
        else:
            assert mode == "replicate", mode
            where = where.clamp(0, size - 1)
        x = x.index_select(axis, where)
    return x
