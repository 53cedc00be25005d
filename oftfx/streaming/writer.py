"""Write tensors to their places, beside the folds: some threads that read, sum up and write."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oftfx.folding.record import SiteFold
from oftfx.streaming.journal import Done, Journal
from oftfx.streaming.maps import Maps
from oftfx.streaming.work import Copy

_PIECE = 4 * 2**20
_THREADS = 2
_WAITING = 4
"""Units that wait for a thread: what a fold gives is in memory until it is written."""
_SYNC_BYTES, _SYNC_SECONDS = 512 * 2**20, 5.0


@dataclass
class Writer:
    """Files under way.

    Attributes:
        directory: where they are.
        journal: gets what is on the disk.
        progress: called with the bytes that were written.
        names: of the files.
    """

    directory: Path
    journal: Journal
    progress: Callable[[int], None]
    names: tuple[str, ...]
    _files: dict[str, int] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_THREADS, "oftfx-write"))
    _running: dict[Future[dict[str, str]], tuple[int, tuple[SiteFold, ...], Mapping[str, bytes]]] = field(
        default_factory=dict
    )
    _written: int = 0
    _synced: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        for name in self.names:
            self._files[name] = os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o644)

    def copy(self, unit: int, copied: Copy, maps: Maps) -> None:
        """Copy tensors."""
        self._submit(unit, (), {}, self._copy, copied, maps)

    def write(
        self, unit: int, parts: list[tuple[Any, Any]], lines: tuple[SiteFold, ...], tails: Mapping[str, bytes]
    ) -> None:
        """Write tensors: targets, and bytes for them."""
        self._submit(unit, lines, tails, self._write, parts)

    def finish(self) -> None:
        """Wait for all, and note it."""
        while self._running:
            self._collect()
        self.sync()

    def close(self) -> None:
        """Note what is done, also after an error, and let the files go."""
        try:
            for future in self._running:
                future.cancel()
            self._pool.shutdown(wait=True)
            for future, (unit, lines, tails) in self._running.items():
                if future.done() and not future.cancelled() and future.exception() is None:
                    self.journal.add(unit, Done(future.result(), lines, tails))
            self._running.clear()
            self.sync()
        finally:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def sync(self) -> None:
        """Let the bytes reach the disk, then the journal."""
        for file in self._files.values():
            os.fdatasync(file)
        self.journal.flush()
        self._written, self._synced = 0, time.monotonic()

    def file(self, name: str) -> int:
        """A file, open."""
        return self._files[name]

    def _submit(
        self,
        unit: int,
        lines: tuple[SiteFold, ...],
        tails: Mapping[str, bytes],
        function: Callable[..., dict[str, str]],
        *arguments: Any,
    ) -> None:
        while len(self._running) >= _THREADS + _WAITING:
            self._collect()
        self._running[self._pool.submit(function, *arguments)] = unit, lines, tails

    def _collect(self) -> None:
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            result = future.result()
            unit, lines, tails = self._running.pop(future)
            self.journal.add(unit, Done(result, lines, tails))
        if self._written >= _SYNC_BYTES or time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def _copy(self, copied: Copy, maps: Maps) -> dict[str, str]:
        digests = {}
        for stored, target in copied.pairs:
            digest, file, place = hashlib.sha256(), self.file(target.file), target.begin or 0
            for begin in range(stored.begin, stored.end, _PIECE):
                end = min(begin + _PIECE, stored.end)
                piece = maps.bytes(stored.file, begin, end)
                self._put(file, piece, place, digest)
                piece.release()
                maps.forget(stored.file, begin, end)
                place += end - begin
            digests[target.name] = digest.hexdigest()
        return digests

    def _write(self, parts: list[tuple[Any, Any]]) -> dict[str, str]:
        digests = {}
        for target, data in parts:
            digest, view = hashlib.sha256(), memoryview(data)
            for begin in range(0, len(view), _PIECE):
                piece = view[begin : begin + _PIECE]
                self._put(self.file(target.file), piece, target.begin + begin, digest)
            digests[target.name] = digest.hexdigest()
        parts.clear()
        return digests

    def _put(self, file: int, piece: memoryview, place: int, digest: Any) -> None:
        digest.update(piece)
        put_at(file, piece, place)
        self._written += len(piece)
        self.progress(len(piece))


def put_at(file: int, data: bytes | memoryview, place: int) -> None:
    """All bytes into an open file; a disk that is nearly full takes some of them without a word."""
    left = memoryview(data)
    while left:
        count = os.pwrite(file, left, place)
        left, place = left[count:], place + count
