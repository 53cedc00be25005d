"""A weight on a grid: codes, scales and zeros; and the grid that a float weight is rounded to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from oftfx.errors import FormatError
from oftfx.grids.levels import Integers, Levels
from oftfx.grids.partition import Partition, joined
from oftfx.precision import piece_on

_NARROWEST, _STEPS = 0.65, 8  # finer steps measured no better on SmolLM2
_SMALLEST = 2.0**-24  # above 0 in float16

_ByElement: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_Fit: TypeAlias = tuple[Tensor, Tensor, Tensor | None]  # error, scale and zero, ``(groups,)`` each


@dataclass(frozen=True)
class Codes:
    """A weight on a grid.

    Attributes:
        codes: ``(rows, columns)``, int16 or uint8; their meaning is the grid's.
        scale: float32 ``(groups,)``.
        zero: float32 ``(groups,)``, in units of a code; None where the grid fixes it.
        parts: how the scales are stored, where the format quantizes them as well; what `Grid.couple` returned.

    Examples:
        >>> import torch
        >>> from oftfx.formats import Codes, Grid, Integers, Partition
        >>> grid = Grid(Partition.tiles((1, 4), (1, 2)), Integers(-7, 7, reach=7))
        >>> coded = Codes(torch.tensor([[7, -2, 1, 0]], dtype=torch.int16), torch.tensor([0.5, 2.0]))
        >>> grid.values(coded).tolist()
        [[3.5, -1.0, 2.0, 0.0]]
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    parts: Any = None

    def cut(self, rows: slice, groups: slice) -> Codes:
        """Those of some rows and their groups."""
        return Codes(self.codes[rows], self.scale[groups], None if self.zero is None else self.zero[groups])


@dataclass(frozen=True, eq=False)
class Grid:
    """The values a format can store: ``W = (level(code) - zero) * scale``, scale and zero by group.

    Attributes:
        partition: the groups.
        levels: the levels before scaling.
        zero: ``"integer"`` or ``"float"``: each group has its own; or the one number they all have.
        product: dtype in which the format's own runtime multiplies, so that values are the layer's to the bit.
        rounded: dtype in which it keeps what came out, where that is narrower.
        round_scale: what a format makes of scales, and of float zeros, when it stores them in a narrower dtype; float32
            ``(groups,)`` both ways.
        couple: the same where it needs the scales of all groups at once (a second quantization); also returns what it
            stores, for `Codes.parts`.
        least_scale: scales are at least this, so that a group of zeros is not divided by zero.
        least_zero: integer zeros that are chosen anew are at least this; None: the smallest level.

    Examples:
        >>> import torch
        >>> from oftfx.formats import Grid, Integers, Partition
        >>> grid = Grid(Partition.tiles((2, 3), (1, 3)), Integers(-7, 7, reach=7))
        >>> coded = grid.fit(torch.tensor([[3.5, -1.1, 0.2], [-7.0, 2.4, 0.0]]))
        >>> coded.scale.tolist(), coded.codes.tolist()
        ([0.5, 1.0], [[7, -2, 0], [-7, 2, 0]])
        >>> grid.values(coded).tolist()
        [[3.5, -1.0, 0.0], [-7.0, 2.0, 0.0]]
    """

    partition: Partition
    levels: Levels
    zero: Literal["integer", "float"] | float = 0.0
    product: torch.dtype = torch.float32
    rounded: torch.dtype = torch.float32
    round_scale: Callable[[Tensor], Tensor] = lambda scale: scale
    couple: Callable[[Tensor], tuple[Tensor, Any]] | None = None
    least_scale: float = 1e-8
    least_zero: int | None = None

    @property
    def symmetric(self) -> bool:
        """Whether the zero is the same for all."""
        return not isinstance(self.zero, str)

    def narrowed(self, columns: int) -> Grid:
        """The grid of one of the partition's column sets."""
        return replace(self, partition=self.partition.narrowed(columns))

    def values(self, coded: Codes) -> Tensor:
        """The weight ``(rows, columns)``, float32."""
        return joined(self.rows(coded), (self.partition.rows, self.partition.columns))

    def rows(self, coded: Codes) -> Iterator[tuple[slice, Tensor]]:
        """The same, some rows at a time and in order."""
        for rows, groups, grid in self._bands(coded.codes.device):
            yield rows, grid._values(coded.cut(rows, groups))

    def _bands(self, device: torch.device) -> Iterator[tuple[slice, slice, Grid]]:
        """See `Partition.bands`: what is done to a weight is done band by band, so that temporaries are small."""
        for rows, groups, partition in self.partition.bands(piece_on(device)):
            yield rows, groups, replace(self, partition=partition)

    def _values(self, coded: Codes) -> Tensor:
        return self._each(self.value, coded.codes, coded.scale, coded.zero)

    def _each(self, function: _ByElement, matrix: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """A function of elements and their scales and zeros, from those of groups."""
        part = self.partition
        if part.consecutive:  # broadcasting is quicker than expanding
            found = function(part.split(matrix), scale.unsqueeze(1), None if zero is None else zero.unsqueeze(1))
            return part.join(found)
        return function(matrix, part.expand(scale), None if zero is None else part.expand(zero))

    def scaled(self, values: Tensor, coded: Codes) -> Tensor:  # noqa: ARG002
        """The part of the weight ``values (rows, columns)`` that is proportional to its scales: all of it."""
        return values

    def value(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Values of codes whose scales and zeros are given element by element (or broadcast)."""
        level = self._offset(self.levels.decode(codes), zero)
        return (level.to(self.product) * scale.to(self.product)).to(self.rounded).float()

    def code(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes of the nearest values under scales and zeros given element by element (or broadcast)."""
        level = values / scale
        if zero is not None:
            level = level + zero
        elif self.zero:
            level = level + float(self.zero)
        return self.levels.encode(level)

    def _offset(self, level: Tensor, zero: Tensor | None) -> Tensor:
        if zero is not None:
            return level - zero
        return level - float(self.zero) if self.zero else level

    def fit(
        self,
        weight: Tensor,
        *,
        search: bool = False,
        importance: Tensor | None = None,
        old: Codes | None = None,
    ) -> Codes:
        """Scales and zeros for a weight, with the nearest codes.

        Args:
            weight: float32 ``(rows, columns)``.
            search: narrow each group's range as far as that lessens its squared error; else the range is the group's.
            importance: what the squared error of an element counts, ``(rows, columns)`` or broadcast to it.
            old: with ``search``, scales and zeros that are tried as well: each group's, or where scales stand together
                all of them at once.

        Raises:
            FormatError: each group has a zero of its own, and the levels are no `Integers`.
        """
        if importance is not None:
            importance = importance.expand_as(weight)
        tried = old if search and self.couple is None else None
        found = [
            grid._range(
                weight[rows],
                search,
                None if importance is None else importance[rows],
                None if tried is None else tried.cut(rows, groups),
            )
            for rows, groups, grid in self._bands(weight.device)
        ]
        scales, zeros = zip(*found, strict=True)
        scale = torch.cat(scales)
        zero = None if self.symmetric else torch.cat([z for z in zeros if z is not None])
        if self.couple is None:
            return self.encode(weight, scale, zero)
        scale, parts = self.stored(scale)  # together, whatever was chosen for each
        new = replace(self.encode(weight, scale, zero), parts=parts)
        if old is None or not search:
            return new
        kept = replace(self.encode(weight, old.scale, old.zero), parts=old.parts)
        return min(kept, new, key=lambda coded: self._missed(weight, coded, importance))

    def _missed(self, weight: Tensor, coded: Codes, importance: Tensor | None) -> float:
        """Squared error of a weight, by what each element counts."""
        total = 0.0
        for rows, groups, grid in self._bands(weight.device):
            missed = (grid._values(coded.cut(rows, groups)) - weight[rows]).square_()
            total += float((missed if importance is None else missed.mul_(importance[rows])).sum(dtype=torch.float64))
        return total

    def _range(
        self, weight: Tensor, search: bool, importance: Tensor | None, old: Codes | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros with the least error."""
        groups = self.partition.split(weight)
        if not search:
            (found,) = self._ranges(groups, search)
            return found
        counts = None if importance is None else self.partition.split(importance)
        known = [] if old is None else [(old.scale, old.zero)]
        fits = ((self._error(groups, *found, counts), *found) for found in chain(known, self._ranges(groups, search)))
        return reduce(_better, fits)[1:]

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Codes:
        """The nearest codes under given scales and zeros, ``(groups,)`` each."""

        def coded() -> Iterator[tuple[slice, Tensor]]:
            for rows, groups, grid in self._bands(weight.device):
                offset = None if zero is None else zero[groups]
                yield rows, grid._each(grid.code, weight[rows], scale[groups], offset)

        return Codes(joined(coded(), (weight.shape[0], weight.shape[1])), scale, zero)

    def nearest(self, weight: Tensor, old: Codes | None = None) -> Codes:
        """Round a weight; groups in which it equals ``old`` keep their bytes.

        Others get scales of their own, also where the old ones are nearer: a weight that has moved little rounds back
        to the codes it came from under those, and the update would be gone.
        """
        if old is None:
            return self.fit(weight)
        same = torch.cat(
            [grid._unchanged(weight[rows], old.cut(rows, groups)) for rows, groups, grid in self._bands(weight.device)]
        )
        if self.couple is not None:  # scales stand together
            return old if bool(same.all()) else self._anew(weight, old)
        new = self._anew(weight, old)
        if _answers(weight) and not bool(same.any()):
            return new
        scale = torch.where(same, old.scale, new.scale)
        zero = None if new.zero is None or old.zero is None else torch.where(same, old.zero, new.zero)
        for rows, groups, grid in self._bands(weight.device):
            new.codes[rows] = torch.where(grid.partition.expand(same[groups]), old.codes[rows], new.codes[rows])
        return Codes(new.codes, scale, zero)

    def _anew(self, weight: Tensor, old: Codes) -> Codes:
        """Nearest codes with scales of its own.

        Where levels are not even about a fixed zero, `Levels.reach` gives another scale even for a weight that has not
        moved: a group whose largest was at 7.5 scales is stored as -8 or 7, and all of its weights would be between the
        levels. A symmetric GPTQ model got worse by that than it is without the adapter. There a scale that is as much
        larger as the group's largest weight is tried as well.
        """
        levels = self.levels
        if not self.symmetric or not isinstance(levels, Integers) or levels.low + levels.high == 2 * float(self.zero):
            return self.fit(weight)
        scales = []
        for rows, groups, grid in self._bands(weight.device):
            split, known = grid.partition.split, old.cut(rows, groups)
            was, now = split(grid._values(known)).abs().amax(1), split(weight[rows])
            largest = now.abs().amax(1)
            by_reach = grid._scale(largest / levels.reach)
            grown = torch.where(was > 0, grid._scale(known.scale * (largest / was)), by_reach)
            errors = [grid._error(now, s, None, None) for s in (grown, by_reach)]
            scales.append(torch.where(errors[1] < errors[0], by_reach, grown))
        scale, parts = self.stored(torch.cat(scales))
        return replace(self.encode(weight, scale, None), parts=parts)

    def _unchanged(self, weight: Tensor, old: Codes) -> Tensor:
        """Which groups of ``weight`` equal ``old``, bool ``(groups,)``."""
        split = self.partition.split
        if not (self.partition.consecutive and _answers(weight)):
            return (split(weight) == split(self._values(old))).all(dim=1)
        groups, codes, scale = split(weight), split(old.codes), old.scale.unsqueeze(1)
        zero = None if old.zero is None else old.zero.unsqueeze(1)
        # Where the first element has changed, the others need not be looked at.
        same = groups[:, 0] == self.value(codes[:, :1], scale, zero)[:, 0]
        maybe = same.nonzero().view(-1)
        was = self.value(codes[maybe], scale[maybe], None if zero is None else zero[maybe])
        same[maybe] = (groups[maybe] == was).all(dim=1)
        return same

    def _error(self, groups: Tensor, scale: Tensor, zero: Tensor | None, counts: Tensor | None) -> Tensor:
        column, offset = scale.unsqueeze(1), None if zero is None else zero.unsqueeze(1)
        missed = (self.value(self.code(groups, column, offset), column, offset) - groups).square_()
        return missed.sum(1) if counts is None else (missed * counts).sum(1)

    def _ranges(self, groups: Tensor, search: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Scales and zeros to choose from, the group's own range first."""
        shares = shares_of(search)
        if self.symmetric:
            largest = groups.abs().amax(1)
            for share in shares:
                yield self._scale(largest * (share / self.levels.reach)), None
            return
        if not isinstance(self.levels, Integers):
            raise FormatError(f"a grid with zeros has integers as levels, this one {type(self.levels).__name__}")
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        least = self.levels.low if self.least_zero is None else self.least_zero
        if least > self.levels.low:  # as many levels are left below zero, used or not
            low = torch.minimum(low, -high * ((least - self.levels.low) / (self.levels.high - least)))
        for share in shares:
            scale = self._scale((high - low) * (share / (self.levels.high - self.levels.low)))
            zero = self.levels.low - low * share / scale
            yield (
                scale,
                (zero.round().clamp(least, self.levels.high) if self.zero == "integer" else self.round_scale(zero)),
            )

    def stored(self, scale: Tensor) -> tuple[Tensor, Any]:
        """Scales ``(groups,)`` as the format stores them, and its parts of them (`Codes.parts`)."""
        scale = self._scale(scale)
        return (scale, None) if self.couple is None else self.couple(scale)

    def _scale(self, scale: Tensor) -> Tensor:
        scale = scale.clamp(min=self.least_scale)
        if self.couple is not None:
            return scale
        kept = self.round_scale(scale)
        # What is too small for a narrow dtype must not become 0, by which would be divided.
        return torch.where(kept > 0, kept, self.round_scale(torch.full_like(scale, _SMALLEST)))


def _answers(tensor: Tensor) -> bool:
    """Whether a number may be asked of it without waiting for a device, or breaking a program."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def shares_of(search: bool) -> list[float]:
    """How much of a group's range is tried, all of it first."""
    return torch.linspace(1.0, _NARROWEST, _STEPS + 1, device="cpu").tolist() if search else [1.0]


def _better(a: _Fit, b: _Fit) -> _Fit:
    chosen = b[0] < a[0]
    zero = None if a[2] is None or b[2] is None else torch.where(chosen, b[2], a[2])
    return torch.where(chosen, b[0], a[0]), torch.where(chosen, b[1], a[1]), zero
