"""The report of a fold whose weights lie in several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from oftfx.errors import FoldError
from oftfx.folding.record import SiteFold

_AGAIN = "The model is folded in part: load it again"


def of_all_rows(line: SiteFold, groups: Sequence[Any]) -> SiteFold:
    """A site's line from those that the processes have made of their rows; all of them have to call this.

    Args:
        line: of the rows here.
        groups: of processes, see `oftfx.formats.sharded.groups_of`.
    """
    for group in groups:
        line = _joined(gathered(line, group, _AGAIN))
    return line


@contextmanager
def together(groups: Sequence[Any]) -> Iterator[None]:
    """Raise in every process of these groups what fails inside in one: the others would wait for it.

    Raises:
        FoldError: it failed in another; some rows are folded and some are not.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    for group in dict.fromkeys(groups):
        found = gathered("" if error is None else f"{type(error).__name__}: {error}", group, _AGAIN)
        if error is None and (text := next(filter(None, found), "")):
            raise FoldError(
                f"another process could not fold its rows ({text}), so the model is folded in part: load it again"
            )
    if error is not None:
        if groups:
            error.add_note("oftfx.fold: other processes may have folded their rows; load the model again")
        raise error


def gathered(value: Any, group: Any, remedy: str) -> list[Any]:
    """What each process of a group gives; all of them have to call this.

    Raises:
        FoldError: one has died; ends with the remedy.
    """
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, value, group=group)
    except RuntimeError as error:  # its connections are closed
        raise FoldError(f"another process has ended early. {remedy}") from error
    return found


def _joined(lines: list[SiteFold]) -> SiteFold:
    """Norms are square roots of sums over rows."""
    energy = sum(s.energy for s in lines)
    whole = [s.energy / s.update**2 if s.update else 0.0 for s in lines]
    before = sum(whole)
    missed = sum(s.relative_error**2 * w for s, w in zip(lines, whole, strict=True))
    return replace(
        lines[0],
        action=next((s.action for s in lines if s.action != "untouched"), lines[0].action),
        energy=energy,
        update=(energy / before) ** 0.5 if before else 0.0,
        relative_error=(missed / before) ** 0.5 if before else 0.0,
        survival=sum(s.survival * s.energy for s in lines) / energy if energy else 1.0,
        bytes_before=sum(s.bytes_before for s in lines),
        bytes_after=sum(s.bytes_after for s in lines),
        note=next((s.note for s in lines if s.note), ""),
        angle=next((s.angle for s in lines if s.angle is not None), None),
        typical_angle=next((s.typical_angle for s in lines if s.angle is not None), None),
    )
