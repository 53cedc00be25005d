"""How much of a model a plan reaches, in bytes of its weight matrices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unreached:
    """A weight matrix that the plan does not rotate.

    Attributes:
        name: the parameter's (of a packed weight the layer's).
        shape: as stored.
        nbytes: its size.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Coverage:
    """Bytes of weight matrices (tensors with two or more axes), each tensor once.

    Attributes:
        reached: bytes of the matrices that the plan rotates.
        total: bytes of all matrices of the model.
        unreached: the others, by name.
    """

    reached: int = 0
    total: int = 0
    unreached: tuple[Unreached, ...] = ()

    @property
    def share(self) -> float:
        """``reached / total``."""
        return self.reached / self.total if self.total else 0.0
