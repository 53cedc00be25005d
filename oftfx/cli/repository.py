"""The command ``oftfx repository``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oftfx.errors import AdapterError


def repository(
    model: Annotated[Path, typer.Argument(help="An .onnx file of oftfx.export_onnx.")],
    out: Annotated[Path, typer.Argument(help="The directory that the server starts from; made, or added to.")],
    server: Annotated[str, typer.Option(help="triton or mlserver.")],
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=FILE.onnx_adapter; once for each.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model; the file's by default.")] = None,
    version: Annotated[int, typer.Option(help="Written next to the versions that are there.")] = 1,
    backend: Annotated[str | None, typer.Option(help="Of Triton: python (default) or onnxruntime.")] = None,
    max_batch_size: Annotated[int, typer.Option(help="Rows in one run; 1: requests share none.")] = 8,
    max_queue_delay: Annotated[float, typer.Option(help="Seconds that a request waits for others at most.")] = 0.002,
    instances: Annotated[int, typer.Option(help="Runs at the same time.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Of one run; every core by default.")] = None,
    http_port: Annotated[int | None, typer.Option(help="By default 8000 for Triton, 8080 for MLServer.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="By default 8001 for Triton, 8081 for MLServer.")] = None,
) -> None:
    """Write a Triton model repository or an MLServer directory; a request chooses its adapter by a parameter.

    Prints the command that starts the server.
    """
    from oftfx.serving.repository import write_repository

    asked: dict[str, Any] = {"server": server, "backend": backend}  # checked there
    written = write_repository(
        model,
        out,
        **asked,
        name=name,
        version=version,
        adapters=named_files(adapter or []),
        max_batch_size=max_batch_size,
        max_queue_delay=max_queue_delay,
        instances=instances,
        threads=threads,
        http_port=http_port,
        grpc_port=grpc_port,
    )
    typer.echo(str(written))


def named_files(words: list[str]) -> dict[str, str]:
    """``NAME=FILE`` words as a mapping.

    Raises:
        AdapterError: a word has no ``=``, or two have one name.
    """
    files: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            raise AdapterError(f"--adapter: got {word!r}, expected NAME=FILE.onnx_adapter")
        if name in files:
            raise AdapterError(f"--adapter: {name!r} is given twice, as {files[name]} and {path}")
        files[name] = path
    return files
