"""Write a directory that an inference server starts from, with everything in it that the server needs."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from oftfx.errors import ExportError, MissingExtraError
from oftfx.files import rename, settle, staging, write_whole

if TYPE_CHECKING:
    from oftfx.serving.copied.runtime import ServedModel
    from oftfx.serving.options import ServerFiles

COPIED = Path(__file__).with_name("copied")
PORTS = {"triton": (8000, 8001), "mlserver": (8080, 8081)}
"""HTTP and gRPC: each server's own defaults."""


@dataclass(frozen=True)
class Repository:
    """What was written.

    Args:
        path: what the server is started with.
        model: the directory of this version of the model; its ``adapters/`` may change while the server runs.
        adapters: the names that a request may use.
        backend: what runs the model: ``"python"`` or ``"onnxruntime"`` in Triton, ``"mlserver"``.
        command: starts the server.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.serving import write_repository
        >>> report = oftfx.export_onnx(torch.nn.Linear(6, 4), "scores.onnx", (torch.randn(5, 6),))
        >>> print(write_repository("scores.onnx", "models", server="triton", backend="onnxruntime"))
        models/scores/1: run by onnxruntime, adapters: none to choose
        start: tritonserver --model-repository=models ...
    """

    path: Path
    model: Path
    adapters: tuple[str, ...]
    backend: str
    command: str

    def __str__(self) -> str:
        names = ", ".join(self.adapters) if self.adapters else "none to choose"
        return f"{self.model}: run by {self.backend}, adapters: {names}\nstart: {self.command}"


def write_repository(
    model: str | Path,
    out: str | Path,
    *,
    server: Literal["triton", "mlserver"],
    name: str | None = None,
    version: int = 1,
    adapters: Mapping[str, str | Path] | None = None,
    backend: Literal["python", "onnxruntime"] | None = None,
    max_batch_size: int = 8,
    preferred_batch_sizes: Sequence[int] = (),
    max_queue_delay: float = 0.002,
    instances: int = 1,
    threads: int | None = None,
    host: str = "127.0.0.1",
    http_port: int | None = None,
    grpc_port: int | None = None,
) -> Repository:
    """Write a Triton model repository or an MLServer model directory.

    A request chooses its adapter by the parameter ``adapter``; without it, or with ``""``, the base model answers. An
    unknown name, two names, or a name for a model without adapters is an error. Requests wait for each other and share
    a run where their shapes and adapters allow it: rows of a ``"mixed"`` model whatever their adapters, of a
    ``"swappable"`` one by adapter. A file that is put into the version's ``adapters/``, replaced or removed there
    counts from the next request that names it. The model, its adapters and our few files that run them are copied: the
    server needs ONNX Runtime and numpy, and neither oftfx nor torch. Models run on the CPU only.

    Sharing a run needs rows that are independent of each other. A graph in which the batch axis stands a second time,
    as in CLIP's ``(batch, batch)``, is never shared; rows may act on each other without that (statistics over the
    batch), and ``max_batch_size=1`` turns sharing off.

    A file that all versions or models share (Triton's ``config.pbtxt``, MLServer's ``settings.json``) is written once
    and then stays as it is; what it settles has to be asked for again with each further version.

    Args:
        model: an ``.onnx`` file of `oftfx.export_onnx`, its external data beside it.
        out: the directory; made, or one that holds other models and versions.
        server: ``"triton"`` or ``"mlserver"``.
        name: of the model; the file's by default.
        version: written next to the versions that are there, which stay as they are.
        adapters: ``.onnx_adapter`` files of `oftfx.export_onnx_adapter` by name, for a ``"swappable"`` model.
        backend: of Triton. ``"python"``, the default, runs ours. ``"onnxruntime"`` is Triton's own, for folded and
            fixed models: less copying, but it **ignores request parameters**, so a request that names an adapter is
            answered as if it had not.
        max_batch_size: rows in one run. Triton refuses a larger request, MLServer runs it by itself. 1: every request
            is run by itself, whatever its rows, by both.
        preferred_batch_sizes: rows at which Triton does not wait for more.
        max_queue_delay: seconds that a request waits for others at most.
        instances: runs at the same time. Triton's Python backend makes a process for each, with a copy of the weights
            of its own; MLServer runs them in threads on one copy.
        threads: of one run; None: as many as there are cores.
        host: where the server listens; the default is this machine alone.
        http_port: by default 8000 for Triton, 8080 for MLServer.
        grpc_port: by default 8001 for Triton, 8081 for MLServer.

    Returns:
        See `Repository`; its ``command`` starts the server.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        ServingError: the model cannot be served, or an adapter does not belong to it.
        ExportError: an argument is wrong, or what is in ``out`` does not go with it. Nothing has been written then.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.serving import write_repository
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3)})
        >>> report = oftfx.export_onnx(model, "scores.onnx", (torch.randn(5, 6),), adapters="swappable")
        >>> files = {"news": oftfx.export_onnx_adapter(model, "news.onnx_adapter")}
        >>> written = write_repository("scores.onnx", "served", server="mlserver", adapters=files)
        >>> written.adapters, written.command
        (('news',), 'mlserver start served')
    """
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "Writing a model repository")
    from oftfx.serving import mlserver, triton
    from oftfx.serving.options import Options

    if server not in PORTS:
        raise ExportError(f"server: got {server!r}, expected 'triton' or 'mlserver'")
    if backend not in (None, "python", "onnxruntime"):
        raise ExportError(f"backend: got {backend!r}, expected 'python' or 'onnxruntime'")
    module = triton if server == "triton" else mlserver
    model, out = Path(model), Path(out)
    options = Options(
        name=model.stem if name is None else name,
        version=version,
        backend=backend,
        max_batch_size=max_batch_size,
        preferred_batch_sizes=tuple(preferred_batch_sizes),
        max_queue_delay=max_queue_delay,
        instances=instances,
        threads=threads,
        host=host,
        http_port=PORTS[server][0] if http_port is None else http_port,
        grpc_port=PORTS[server][1] if grpc_port is None else grpc_port,
    )
    place = out / options.name / str(version)
    if place.exists():
        raise ExportError(f"{place} is there already; choose another version, or remove it first")
    files = _files(model, adapters or {})
    # A version is made beside its place, opened there as the server will open it, and moved whole.
    with staging(out, options.name, ExportError) as folder:
        made = folder / str(version)
        served = _fill(made, files)
        ours = module.server_files(served, options)
        names = tuple(served.adapter_names())
        if served.mode != "swappable":
            (made / "adapters").rmdir()
        for path, text in ours.own.items():
            (made / path).write_text(text)
        for path, source in ours.runtime.items():
            _copy(COPIED / source, made / path)
        settle(made)
        with _shared(place.parent, ours, module):
            rename(made, place)
    command = ours.command.replace("{out}", shlex.quote(str(out)))
    return Repository(out, place, names, ours.backend, command)


def _files(model: Path, adapters: Mapping[str, str | Path]) -> dict[str, Path]:
    """What is copied into a version's directory: source by name."""
    from oftfx.serving.copied.runtime import NAME, SUFFIX

    if not model.is_file():
        raise ExportError(f"{model} is no file; expected one that oftfx.export_onnx wrote")
    files = {"model.onnx": model, **{name: model.parent / name for name in _external(model)}}
    for name, path in adapters.items():
        if not NAME.fullmatch(name):
            raise ExportError(f"adapters: {name!r} cannot name an adapter; use letters, digits, '_', '.' and '-'")
        files[f"adapters/{name}{SUFFIX}"] = Path(path)
    if odd := [name for name in files if any(len(part) > 255 for part in Path(name).parts)]:
        raise ExportError(f"{model} names a file {odd[0][:80]!r}..., which no file can be called")
    if missing := [path for path in files.values() if not path.is_file()]:
        if missing[0].is_dir():
            raise ExportError(
                f"{missing[0]} is a directory; a server takes {SUFFIX} files, which oftfx.export_onnx_adapter (oftfx "
                "export-adapter) makes of an adapter"
            )
        raise ExportError(f"{missing[0]} is not there")
    return files


def _external(model: Path) -> set[str]:
    """The files beside the model that hold its large weights, by the names under which the model looks for them."""
    import onnx

    try:
        tensors = onnx.load(str(model), load_external_data=False).graph.initializer
    except Exception as error:  # protobuf's own types
        raise ExportError(f"{model} is not an ONNX file, or is damaged; expected one of oftfx.export_onnx") from error
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def _fill(made: Path, files: Mapping[str, Path]) -> ServedModel:
    from oftfx.serving.copied.runtime import ServedModel

    (made / "adapters").mkdir(parents=True)
    for name, source in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ExportError(f"{files['model.onnx']} keeps weights in {name!r}; expected a file beside it")
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, made / name)
    return ServedModel(made / "model.onnx", adapters=made / "adapters", threads=1)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


@contextmanager
def _shared(home: Path, ours: ServerFiles, module: ModuleType) -> Iterator[None]:
    """The model's directory, with what all versions share.

    What is there and passes the check stays as it is: it holds for others too, and may be edited by hand. What is made
    here goes again where the version does not come after it.
    """
    out = home.parent
    missing = {path: text for path, text in ours.shared.items() if not (out / path).exists()}
    for path in ours.shared.keys() - missing.keys():
        module.check(str(out / path), (out / path).read_text(), ours.shared[path])
    try:
        home.mkdir(exist_ok=True)
        for path, text in missing.items():
            write_whole(out / path, text.encode(), ExportError)
        yield
    except BaseException:
        for path in missing:
            (out / path).unlink(missing_ok=True)
        with suppress(OSError):
            home.rmdir()  # which only takes an empty one
        raise
