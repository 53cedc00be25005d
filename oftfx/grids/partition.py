"""Which elements of a weight matrix share a scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_BLOCK = 64  # columns that are treated together where scales do not tie columns to each other


@dataclass(frozen=True, eq=False)
class Partition:
    """A weight ``(rows, columns)`` cut into groups of equal size; every element is in exactly one.

    Attributes:
        rows: ``out_features``.
        columns: ``in_features``.
        kind: ``"tiles"``: rectangles of the weight, the last ones possibly smaller; ``"flat"``: runs of the flattened
            weight, which may cross rows; ``"strided"``: elements of the flattened weight that are ``size / group``
            apart (HQQ's axis 0).
        tile: rows and columns of a tile; for the other kinds ``(1, elements of a group)``.
        order: the columns in the order in which tiles are cut (act-order), int64 ``(columns,)``; None: as they are.

    Examples:
        >>> import torch
        >>> from oftfx.formats import Partition
        >>> partition = Partition.tiles((2, 5), (1, 3))
        >>> partition.split(torch.arange(10).view(2, 5)).tolist()
        [[0, 1, 2], [3, 4, 0], [5, 6, 7], [8, 9, 0]]
        >>> partition.expand(torch.tensor([1, 2, 3, 4])).tolist()
        [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]
    """

    rows: int
    columns: int
    kind: str
    tile: tuple[int, int]
    order: Tensor | None = None

    @classmethod
    def tiles(cls, shape: tuple[int, int], tile: tuple[int, int], order: Tensor | None = None) -> Partition:
        """Rectangles; ``(1, g)`` are groups of ``g`` columns, ``(1, columns)`` rows, ``shape`` itself one for all."""
        return cls(*shape, "tiles", (min(tile[0], shape[0]), min(tile[1], shape[1])), order)

    @classmethod
    def flat(cls, shape: tuple[int, int], size: int) -> Partition:
        """Runs of ``size`` elements of the flattened weight; the last one may be shorter."""
        return cls.tiles(shape, (1, size)) if shape[1] % size == 0 else cls(*shape, "flat", (1, size))

    @classmethod
    def strided(cls, shape: tuple[int, int], size: int) -> Partition:
        """The columns of ``weight.reshape(size, -1)``."""
        return cls(*shape, "strided", (1, size))

    @property
    def groups(self) -> int:
        """How many there are."""
        if self.kind == "tiles":
            return _ceil(self.rows, self.tile[0]) * _ceil(self.columns, self.tile[1])
        return _ceil(self.rows * self.columns, self.tile[1])

    @property
    def consecutive(self) -> bool:
        """Whether the groups follow each other in the flattened weight, so that `split` and `join` are views."""
        if self.kind == "flat":
            return self.rows * self.columns % self.tile[1] == 0
        whole = self.tile[0] == 1 and self.columns % self.tile[1] == 0
        return self.kind == "tiles" and whole and self.order is None

    def split(self, weight: Tensor) -> Tensor:
        """``(groups, members)`` of a matrix ``(rows, columns)``; what is missing in a smaller group is zero."""
        if self.kind == "strided":
            return weight.reshape(self.tile[1], -1).T
        if self.kind == "flat":
            flat = weight.reshape(-1)
            return torch.nn.functional.pad(flat, (0, -flat.numel() % self.tile[1])).view(-1, self.tile[1])
        if self.order is not None:
            weight = weight[:, self.order]
        high, wide = self.tile
        down, across = -self.rows % high, -self.columns % wide
        if down or across:
            weight = torch.nn.functional.pad(weight, (0, across, 0, down))
        if high == 1:
            return weight.reshape(-1, wide)
        return weight.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).reshape(-1, high * wide)

    def join(self, groups: Tensor) -> Tensor:
        """The matrix for ``(groups, members)``; inverse of `split`."""
        if self.kind == "strided":
            return groups.T.reshape(self.rows, self.columns)
        if self.kind == "flat":
            return groups.reshape(-1)[: self.rows * self.columns].view(self.rows, self.columns)
        high, wide = self.tile
        across = _ceil(self.columns, wide)
        if high == 1:
            matrix = groups.reshape(-1, across * wide)
        else:
            matrix = groups.view(-1, across, high, wide).transpose(1, 2).reshape(-1, across * wide)
        matrix = matrix[: self.rows, : self.columns]
        return matrix if self.order is None else matrix[:, torch.argsort(self.order)]

    def expand(self, values: Tensor) -> Tensor:
        """One value a group ``(groups,)`` as a matrix ``(rows, columns)``."""
        if self.kind == "tiles" and self.consecutive:
            return values.view(self.rows, -1, 1).expand(-1, -1, self.tile[1]).reshape(self.rows, self.columns)
        return self.join(values.unsqueeze(1).expand(-1, self.tile[0] * self.tile[1]))

    def pick(self, matrix: Tensor) -> Tensor:
        """The value of each group ``(groups,)`` from a matrix that is constant on it; inverse of `expand`."""
        return self.split(matrix)[:, 0].contiguous()

    def groups_of(self, columns: Tensor) -> Tensor:
        """The group of each element of some columns, int64 ``(rows, len(columns))``."""
        rows = torch.arange(self.rows, device=columns.device).unsqueeze(1)
        if self.kind == "tiles":
            if self.order is not None:
                columns = torch.argsort(self.order)[columns]
            return rows // self.tile[0] * _ceil(self.columns, self.tile[1]) + columns // self.tile[1]
        flat = rows * self.columns + columns
        return flat // self.tile[1] if self.kind == "flat" else flat % self.groups

    def column_sets(self, device: torch.device) -> list[Tensor]:
        """The columns in sets that no group crosses, int64 each; all in one where groups tie them together."""
        every = torch.arange(self.columns, device=device) if self.order is None else self.order.to(device)
        if self.kind == "tiles":
            return list(every.split(self.tile[1]))
        free = self.kind == "strided" and self.rows % self.tile[1] == 0
        return list(every.split(_BLOCK)) if free else [every]

    def narrowed(self, columns: int) -> Partition:
        """The partition of one of the column sets, which has ``columns`` columns."""
        if columns == self.columns:
            return Partition(self.rows, columns, self.kind, self.tile)
        if self.kind == "tiles":
            return Partition.tiles((self.rows, columns), self.tile)
        return Partition(self.rows, columns, self.kind, self.tile)

    def bands(self, elements: int) -> list[tuple[slice, slice, Partition]]:
        """Rows that no group crosses, their groups, and the partition of these rows by itself; about so many elements.

        One band of all rows where groups lie across them, and for a compiler, whose program would grow with them.
        """
        step = {"tiles": self.tile[0], "flat": self.tile[1] // math.gcd(self.tile[1], self.columns)}
        if self.kind not in step or torch.compiler.is_compiling():
            return [(slice(0, self.rows), slice(0, self.groups), self)]
        high = max(1, elements // (self.columns * step[self.kind])) * step[self.kind]
        found, first = [], 0
        for start in range(0, self.rows, high):
            part = replace(self, rows=min(high, self.rows - start))
            found.append((slice(start, start + part.rows), slice(first, first + part.groups), part))
            first += part.groups
        return found


def joined(parts: Iterable[tuple[slice, Tensor]], shape: tuple[int, int]) -> Tensor:
    """A matrix of its rows."""
    remaining = iter(parts)
    rows, part = next(remaining)
    if part.shape == shape:
        return part
    whole = part.new_empty(shape)
    whole[rows] = part
    for rows, part in remaining:
        whole[rows] = part
    return whole


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
