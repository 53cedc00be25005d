"""One execution of a target, watched: how it ends, how long it takes, what it opens and how much memory it asks for."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oftfx.errors import OftfxError

SECONDS, MEMORY = 2.0, 400 * 2**20
"""Of processor time for one input, and by how much the process may grow for it; inputs are below 200 kB."""
_IN_OPEN, _NONBLOCK = 0x20, 0x800


@dataclass(frozen=True)
class Finding:
    """What must not be.

    Attributes:
        kind: in one word.
        said: in full.
        place: where, so that the same thing is found once.
    """

    kind: str
    said: str
    place: str


@dataclass
class Watch:
    """What happens meanwhile; one a process, for an audit hook stays for good.

    Attributes:
        outside: a directory beside those of the inputs, in which nobody has any business. The kernel says who opens
            something there, also of code that is not Python.
    """

    outside: Path
    _pickles: list[str] = field(default_factory=list)
    _on: bool = False

    def __post_init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._inotify = libc.inotify_init1(_NONBLOCK)
        self.outside.mkdir(parents=True, exist_ok=True)
        libc.inotify_add_watch(self._inotify, str(self.outside).encode(), _IN_OPEN)
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: Any) -> None:
        if self._on and event == "pickle.find_class":
            self._pickles.append(".".join(map(str, arguments[:2])))

    def run(self, target: Callable[[bytes], Any], data: bytes) -> Finding | None:
        """Run one input; None where all is well."""
        self._pickles.clear()
        self._opened()
        before, began = _peak(), time.process_time()
        self._on = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target(data)
            found = None
        except OftfxError as error:
            found = None if str(error).strip() else Finding("silent", repr(error), _where(error))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a MemoryError, a SystemExit, a panic of Rust
            found = Finding(type(error).__name__, "".join(traceback.format_exception(error))[-3000:], _where(error))
        finally:
            self._on = False
        took, grown = time.process_time() - began, _peak() - before
        if found is None and self._pickles:
            found = Finding("pickle", f"unpickled {', '.join(self._pickles)}", self._pickles[0])
        if found is None and self._opened():
            found = Finding("traversal", f"opened a file in {self.outside}", "")
        if found is None and took > SECONDS:
            found = Finding("slow", f"{took:.1f} s", "")
        if found is None and grown > MEMORY:
            found = Finding("memory", f"{grown:,} bytes", "")
        return found

    def _opened(self) -> bool:
        try:
            return bool(os.read(self._inotify, 65536))
        except BlockingIOError:
            return False


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _where(error: BaseException) -> str:
    """Type, and the innermost lines of ours."""
    lines = [
        f"{Path(f.filename).name}:{f.name}:{f.lineno}"
        for f in traceback.extract_tb(error.__traceback__)
        if "/oftfx/" in f.filename or "/passes/" in f.filename
    ]
    return " ".join([type(error).__name__, *lines[-2:]])
