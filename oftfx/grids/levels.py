"""The values that a scaled weight may take, and rounding to the nearest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oftfx.grids.lookup import decoded, named


class Levels(ABC):
    """A finite set of levels. Codes are integers; `encode` saturates.

    Attributes:
        reach: the largest magnitude of a level on both sides; a group's largest element is scaled to it.

    Examples:
        >>> import torch
        >>> from oftfx.formats import Integers, Levels
        >>> levels = Integers(-3, 3, reach=3)
        >>> isinstance(levels, Levels), levels.decode(levels.encode(torch.tensor([0.4, 1.6, -9.0]))).tolist()
        (True, [0.0, 2.0, -3.0])
    """

    reach: float

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Codes of the levels nearest to ``values`` (float32, any shape)."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The levels of codes, float32."""


@dataclass(frozen=True)
class Integers(Levels):
    """``low, ..., high``; a code is the integer itself, int16. Halves are rounded to even.

    Attributes:
        low: smallest.
        high: largest, below 2**15.
        reach: what a group's largest magnitude is scaled to, where zero is fixed; formats differ in it.

    Examples:
        >>> import torch
        >>> from oftfx.formats import Integers
        >>> Integers(-8, 7, reach=7).encode(torch.tensor([-9.2, 0.5, 1.5, 6.9])).tolist()
        [-8, 0, 2, 7]
    """

    low: int
    high: int
    reach: float = 0.0

    def encode(self, values: Tensor) -> Tensor:
        """Round and clamp."""
        return values.round().clamp_(self.low, self.high).to(torch.int16)

    def decode(self, codes: Tensor) -> Tensor:
        """As float32."""
        return codes.float()


@dataclass(frozen=True, eq=False)
class Table(Levels):
    """Levels of a table, in any order; a code is an index, uint8.

    Attributes:
        values: float32 ``(levels,)``.
        reach: what a group's largest magnitude is scaled to.

    Examples:
        >>> import torch
        >>> from oftfx.formats import Table
        >>> table = Table(torch.tensor([0.0, 0.5, 1.0, -1.0]))
        >>> table.encode(torch.tensor([0.3, -4.0, 0.8])).tolist()
        [1, 3, 2]
    """

    values: Tensor
    reach: float = 1.0
    _sorted: Tensor = field(init=False, repr=False)
    _middles: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        order = torch.argsort(self.values, stable=True)
        ascending = self.values[order]
        object.__setattr__(self, "_sorted", order.to(torch.uint8))
        object.__setattr__(self, "_middles", (ascending[1:] + ascending[:-1]) / 2)

    def encode(self, values: Tensor) -> Tensor:
        """The nearest entry; of two equally near, the lower."""
        return named(values, *self.searched())

    def searched(self) -> tuple[Tensor, Tensor]:
        """Limits, ascending, and the code of what has so many of them below it."""
        return self._middles, self._sorted

    def decode(self, codes: Tensor) -> Tensor:
        """Look up."""
        return decoded(self.values, codes)


_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_HALVES_DOWN = (True, False, True, False, True, False, True)
"""Of two magnitudes of `_FLOAT4` the one with the even last bit is taken half way between them."""


class Float4(Table):
    """The 4-bit float of the OCP microscaling formats, E2M1: a sign, two bits of exponent, one of mantissa.

    A code is its four bits, the sign highest. It has no infinities and saturates at 6.

    Args:
        device: where the table lies.

    Examples:
        >>> import torch
        >>> from oftfx.formats import Float4
        >>> levels = Float4()
        >>> codes = levels.encode(torch.tensor([0.25, 0.75, -2.5, 5.1, -90.0]))
        >>> codes.tolist(), levels.decode(codes).tolist()
        ([0, 2, 12, 7, 15], [0.0, 1.0, -2.0, 6.0, -6.0])
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        magnitudes = torch.tensor(_FLOAT4, device=device)
        super().__init__(torch.cat([magnitudes, -magnitudes]), 6.0)
        middles = (magnitudes[1:] + magnitudes[:-1]) / 2
        down = torch.tensor(_HALVES_DOWN, device=device)
        # What is half way and goes up belongs to the upper side: the next smaller float is the limit then.
        limits = torch.where(down, middles, torch.nextafter(middles, torch.zeros_like(middles)))
        object.__setattr__(self, "_limits", limits)
        object.__setattr__(self, "_magnitudes", torch.arange(len(magnitudes), dtype=torch.uint8, device=device))

    def encode(self, values: Tensor) -> Tensor:
        """Halves to even; zero has a sign."""
        code = named(values.abs(), *self.searched())
        return torch.where(torch.signbit(values), code + 8, code)

    def searched(self) -> tuple[Tensor, Tensor]:
        """The same of magnitudes."""
        return self._limits, self._magnitudes  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Float8(Levels):
    """A float8 type of torch; a code is its byte, uint8.

    Attributes:
        dtype: ``torch.float8_e4m3fn``, ...
        reach: what a group's largest magnitude is scaled to; its largest finite value unless a format says else.

    Examples:
        >>> import torch
        >>> from oftfx.formats import Float8
        >>> levels = Float8(torch.float8_e4m3fn)
        >>> levels.reach, levels.decode(levels.encode(torch.tensor([500.0, 17.0, 0.3]))).tolist()
        (448.0, [448.0, 16.0, 0.3125])
    """

    dtype: torch.dtype
    reach: float = 0.0

    def __post_init__(self) -> None:
        if not self.reach:
            object.__setattr__(self, "reach", torch.finfo(self.dtype).max)

    def encode(self, values: Tensor) -> Tensor:
        """Saturate, then round to even."""
        largest = torch.finfo(self.dtype).max
        return values.clamp(-largest, largest).to(self.dtype).view(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """As float32."""
        return codes.view(self.dtype).float()
