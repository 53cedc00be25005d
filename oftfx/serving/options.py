"""How a model is served, whatever the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from oftfx.errors import ExportError
from oftfx.serving.copied.runtime import NAME


@dataclass(frozen=True)
class Options:
    """What `oftfx.serving.write_repository` was asked for; its docstring says what each means."""

    name: str
    version: int
    backend: str | None
    max_batch_size: int
    preferred_batch_sizes: tuple[int, ...]
    max_queue_delay: float
    instances: int
    threads: int | None
    host: str
    http_port: int
    grpc_port: int

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ExportError(
                f"name: got {self.name!r}, expected a directory's name of letters, digits, '_', '.' and '-'"
            )
        for what, least in (("version", 1), ("max_batch_size", 1), ("instances", 1), ("threads", 1)):
            value = getattr(self, what)
            if not (isinstance(value, int) and value >= least) and not (what == "threads" and value is None):
                raise ExportError(f"{what}: got {value!r}, expected a whole number from {least}")
        for what in ("http_port", "grpc_port"):
            value = getattr(self, what)
            if not (isinstance(value, int) and 1 <= value <= 65535):
                raise ExportError(f"{what}: got {value!r}, expected 1 to 65535")
        if wrong := [n for n in self.preferred_batch_sizes if not 1 <= n <= self.max_batch_size]:
            raise ExportError(f"preferred_batch_sizes: got {wrong[0]}, expected 1 to {self.max_batch_size}")
        if not self.max_queue_delay >= 0:
            raise ExportError(f"max_queue_delay: got {self.max_queue_delay}, expected seconds, not below 0")


@dataclass(frozen=True)
class ServerFiles:
    """The files of one server's repository, beside the model and its adapters.

    Args:
        shared: text by path from the repository's root, of files that all models or versions share.
        own: text by name, of files of this version.
        runtime: what of ours is copied into this version: file or package by the name that it gets.
        backend: what runs the model.
        command: starts the server, for a shell; ``{out}`` stands for the repository.
    """

    shared: Mapping[str, str]
    own: Mapping[str, str]
    runtime: Mapping[str, str]
    backend: str
    command: str
