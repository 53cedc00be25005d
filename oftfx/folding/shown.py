"""What a layer reads on the calibration inputs, in the model that is being folded and in the unfolded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

Regular = Literal["as seen", "damped", "shrunk", "diagonal"]
"""How far second moments of few inputs are believed; see `Shown.moments`."""
_DAMPING, _RIDGE = 0.1, 0.05


def _nothing() -> None:
    """Rows in memory stay there."""


@dataclass(frozen=True, eq=False)
class Call:
    """How a layer is called.

    Attributes:
        x: what it reads, one of the arguments.
        args: by position.
        kwargs: by name.
    """

    x: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def reading(self, x: Tensor) -> Call:
        """The same call, but of another tensor."""
        args = tuple(x if a is self.x else a for a in self.args)
        return Call(x, args, {k: x if v is self.x else v for k, v in self.kwargs.items()})


@dataclass(frozen=True, eq=False)
class ExpertCalls:
    """What it takes to see which rows each expert of a layer reads: see `oftfx.folding.expert_rows`.

    Attributes:
        calls: of the layer, one for each of its inputs.
        fellow: the layer in the unfolded model; None where there is none.
    """

    calls: Sequence[Call]
    fellow: nn.Module | None


@dataclass(frozen=True, eq=False)
class Shown:
    """Rows that a layer reads, with the rows of the same tokens in the unfolded model.

    Attributes:
        inputs: ``X~ (..., in)`` of each batch: what the layers before it, already folded, have made.
        unfolded: ``X`` of the same batch, or None where it is not known.
        read: called when the rows of a batch have been read.
        experts: of a layer that hands rows on to experts of its own.
    """

    inputs: Sequence[Tensor]
    unfolded: Sequence[Tensor | None]
    read: Callable[[], None] = _nothing
    experts: ExpertCalls | None = None

    @cached_property
    def width(self) -> int:
        """``in``."""
        return self.inputs[0].shape[-1]

    @cached_property
    def tokens(self) -> int:
        """How many rows there are."""
        return sum(x.numel() // x.shape[-1] for x in self.inputs)

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """``(X~, X)`` of each batch, ``(n, in)`` float32; the same twice where the unfolded rows are not known."""
        for x, y in zip(self.inputs, self.unfolded, strict=True):
            flat = _flat(x)
            yield flat, flat if y is None else _flat(y)
            self.read()

    @cached_property
    def seen(self) -> Tensor:
        """``X~^T X~ (in, in)``, float32."""
        return self._product(lambda x, _: x)

    @cached_property
    def missed(self) -> Tensor | None:
        """``X~^T (X - X~) (in, in)``; None where the inputs are those of the unfolded model."""
        if all(y is None or torch.equal(x, y) for x, y in zip(self.inputs, self.unfolded, strict=True)):
            return None
        return self._product(lambda x, y: y - x)

    @torch.no_grad()
    def _product(self, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        total = torch.zeros(self.width, self.width, device=self.inputs[0].device)
        for x, y in self.rows():
            total.addmm_(x.T, of(x, y))
        return total

    def moments(self, regular: Regular = "as seen") -> Tensor:
        """``X~^T X~``, believed as far as there are inputs to show it.

        ``damped``: a tenth of the mean of its diagonal is added there. ``shrunk``: what is not on the diagonal is
        multiplied by one less the share of noise in the correlations, ``sum Var(r_ij) / sum r_ij^2`` with
        ``Var(r) = (1 - r^2)^2 / tokens``. ``diagonal``: nothing else is left.

        Source: Schaefer and Strimmer, Statistical Applications in Genetics and Molecular Biology 4 (2005), 32.
        """
        if regular == "as seen":
            return self.seen
        diagonal = self.seen.diagonal()
        if regular == "diagonal":
            return torch.diag(diagonal)
        if regular == "damped":
            return _raised(self.seen, _DAMPING)
        believed = self.seen * (1 - self._noise)
        believed.diagonal().copy_(diagonal)
        return believed

    @cached_property
    def _noise(self) -> float:
        root = self.seen.diagonal().clamp(min=1e-30).sqrt()
        squares = (self.seen / root).div_(root.unsqueeze(1)).square_().fill_diagonal_(0)
        whole = float(squares.sum())
        noise = float(squares.sub_(1).square_().sum()) - len(root)  # the diagonal adds one for each
        return min(1.0, noise / self.tokens / whole) if whole > 0 else 1.0

    def corrected(self, target: Tensor, moments: Tensor, share: float) -> Tensor:
        """What the weight should be for the layer to give from ``X~`` what ``target`` gives from ``X``.

        ``target + share * target D^T (H + ridge)^-1`` with ``D = X~^T (X - X~)``: the least-squares solution of
        ``|X~ W^T - X target^T|``, or a share of the way there.

        Source: the targets of Qronos, arXiv 2505.11695, and GPTAQ, arXiv 2504.02692; the share is that of QEP,
        arXiv 2504.09629.
        """
        if not share or self.missed is None:
            return target
        factor = _raised(moments.mT, _RIDGE)  # by columns, as the solver wants it, so it takes its own place
        failed = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if failed:
            return target
        change = self.missed @ target.to(factor).T
        torch.cholesky_solve(change, factor, out=change)
        return change.T.to(target).mul_(share).add_(target)

    @torch.no_grad()
    def outputs(self, weight: Tensor, *, own: bool = False) -> Tensor:
        """``X weight^T (rows, out)``, float32, or with ``own`` ``X~ weight^T``; of not more than some rows."""
        return self.sampled(self.tokens, own=own) @ weight.float().T

    def sampled(self, tokens: int, *, own: bool) -> Tensor:
        """Some rows of ``X``, or with ``own`` of ``X~``, to judge by: evenly from all batches.

        Args:
            tokens: how many there are to choose from.
            own: see above.
        """
        every = max(1, tokens // _JUDGED)
        return torch.cat([(x if own else y)[::every] for x, y in self.rows()])

    def is_zero(self) -> bool:
        """Whether nothing but zeros was read."""
        return not any(bool(x.any()) for x in self.inputs)

    def is_finite(self) -> bool:
        """Whether there is no infinity or NaN among what was read."""
        every = (x.detach() for x in (*self.inputs, *self.unfolded) if x is not None and x.numel())
        found = [torch.stack(torch.aminmax(x)) for x in every]
        return not found or bool(torch.isfinite(torch.stack(found)).all())  # NaN is both

    @cached_property
    def parts(self) -> tuple[Shown, Shown]:
        """`split`, kept with all that is computed of it."""
        return self.split()

    def split(self, before: int = 0, count: int | None = None, *, alone: bool = True) -> tuple[Shown, Shown]:
        """To learn from, and to judge by: every eighth batch; of fewer batches the last quarter of each one's rows.

        Args:
            before: how many batches of other processes come before these.
            count: how many there are in all processes; None: these are all.
            alone: whether what there is to judge by is all here: where it is nothing, what is learnt from has to do.
        """
        count = len(self.inputs) if count is None else count
        if count >= _EVERY:
            held = [i for i in range(len(self.inputs)) if (before + i) % _EVERY == _EVERY - 1]
            return self._some([i for i in range(len(self.inputs)) if i not in held]), self._some(held)
        first, last = [], []
        for x, y in self.rows():
            cut = max(1, len(x) * 3 // 4)
            first.append((x[:cut], y[:cut]))
            if cut < len(x):
                last.append((x[cut:], y[cut:]))
        return Shown(*_columns(first), self.read), Shown(*_columns(last or first if alone else last), self.read)

    def _some(self, which: Sequence[int]) -> Shown:
        return Shown([self.inputs[i] for i in which], [self.unfolded[i] for i in which], self.read)


_EVERY = 8
_JUDGED = 1 << 10


class Showing:
    """`Shown` of one layer after the other; layers that read the same tensors share it, and what it has computed.

    Memory is that of one: what the layer read, until the next one is shown, and a few matrices ``(in, in)``, float32.

    Args:
        read: see `Shown`.
    """

    def __init__(self, read: Callable[[], None] = _nothing) -> None:
        self._read = read
        self._value: Shown | None = None
        self._versions: list[int | None] = []

    def of(self, inputs: Sequence[Tensor], unfolded: Sequence[Tensor | None]) -> Shown:
        """What is known of a layer that reads these; a fellow of another shape is not of the same tokens."""
        fellows = [y if y is not None and y.shape == x.shape else None for x, y in zip(inputs, unfolded, strict=True)]
        versions = [_version(t) for t in (*inputs, *fellows)]
        old = self._value
        known = () if old is None else (*old.inputs, *old.unfolded)
        same = len(known) == len(versions) and all(a is b for a, b in zip(known, (*inputs, *fellows), strict=True))
        if old is not None and same and None not in versions and versions == self._versions:
            return old
        self._value = old = None  # before the next one is made
        self._value, self._versions = Shown(list(inputs), fellows, self._read), versions
        return self._value


def _version(x: Tensor | None) -> int | None:
    """Counts what was written in place; None where that is not known."""
    if x is None:
        return 0
    return None if x.is_inference() else x._version


def _flat(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float()


def _columns(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor | None]]:
    return [x for x, _ in pairs], [None if y is x else y for x, y in pairs]


def _raised(matrix: Tensor, share: float) -> Tensor:
    """A copy with a share of the diagonal's mean added to it."""
    result = matrix.clone()
    result.diagonal().add_(share * float(matrix.diagonal().mean()))
    return result
