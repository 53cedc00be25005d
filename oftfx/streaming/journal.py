"""What a run has done, line by line, so that the next one goes on."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from oftfx.files import put, sync
from oftfx.folding.record import SiteFold
from oftfx.typed_json import made, parsed

_VERSION = 1


@dataclass(frozen=True)
class Done:
    """What a unit of the work has given.

    Attributes:
        digests: SHA-256 of its tensors, by name.
        lines: of the report.
        tails: bytes of those that come last in their file.
    """

    digests: Mapping[str, str] = field(default_factory=dict)
    lines: tuple[SiteFold, ...] = ()
    tails: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """A unit that is done, as a line has it; tails in base 64."""

    unit: int
    digests: Mapping[str, str]
    lines: tuple[SiteFold, ...]
    tails: Mapping[str, str]


@dataclass
class Journal:
    """Units that are done, on the disk after their bytes.

    Attributes:
        path: the file.
        done: by their place in the work.
    """

    path: Path
    done: dict[int, Done] = field(default_factory=dict)
    _waiting: list[bytes] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, key: str) -> Journal | None:
        """What an earlier run with the same input has done; None where it had another one, or there was none."""
        if not path.is_file():
            return None
        first, *lines = path.read_bytes().split(b"\n")
        if _parsed(first) != {"oftfx_fold_checkpoint": _VERSION, "key": key}:
            return None
        result = cls(path)
        for line in lines[:-1]:  # what is behind the last line's end was cut off
            entry = _entry(line)
            if entry is None:  # what comes after it is done again
                break
            tails = {n: base64.b64decode(t) for n, t in entry.tails.items()}
            result.done[entry.unit] = Done(entry.digests, entry.lines, tails)
        return result

    @classmethod
    def begin(cls, path: Path, key: str) -> Journal:
        """A new one."""
        result = cls(path)
        result._waiting.append(_line({"oftfx_fold_checkpoint": _VERSION, "key": key}))
        result.flush()
        return result

    def add(self, unit: int, done: Done) -> None:
        """Note a unit, from the next `flush` on."""
        self.done[unit] = done
        tails = {n: base64.b64encode(t).decode() for n, t in done.tails.items()}
        self._waiting.append(_line(asdict(_Entry(unit, dict(done.digests), done.lines, tails))))

    def flush(self) -> None:
        """Write what was noted; the bytes that it speaks of are on the disk already."""
        if not self._waiting:
            return
        new = not self.path.exists()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            self._cut(file)
            put(file, b"".join(self._waiting))
            os.fsync(file)
        finally:
            os.close(file)
        self._waiting.clear()
        if new:
            sync(self.path.parent)

    def _cut(self, file: int) -> None:
        """Go to the end of the last whole line."""
        size = os.fstat(file).st_size
        whole = self.path.read_bytes().rfind(b"\n") + 1 if size else 0
        if whole != size:
            os.ftruncate(file, whole)
        os.lseek(file, whole, os.SEEK_SET)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    try:
        return parsed(line)
    except ValueError:
        return None


def _entry(line: bytes) -> _Entry | None:
    """A line of a unit; None where it is none of ours, whole."""
    try:
        found = made(_Entry, parsed(line))
        for text in found.tails.values():
            base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return found
