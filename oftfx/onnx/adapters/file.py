"""Write one adapter as the file that ONNX Runtime's adapter interface loads."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn as nn

from oftfx.errors import ExportError, MissingExtraError
from oftfx.onnx.adapters.blocks import adapter_blocks, check_fit, interface_of

VERSION = 1


def export_onnx_adapter(
    model: nn.Module, path: str | Path, *, adapter: str = "default", graph: str | Path | None = None
) -> Path:
    """Write an adapter for graphs that were exported with ``adapters="swappable"``.

    The file holds the blocks ``R (blocks, b, b)`` in float32 under the names of the graph's inputs,
    ``<site>.oft.blocks``; the Cayley transform has been computed. Sites that the adapter does not rotate stay at the
    identity. ONNX Runtime loads it with ``LoraAdapter().Load(path)`` (1.20 or later) and applies it to one request with
    ``RunOptions().add_active_adapter``. Of two adapters that overlap it silently takes the first, so one adapter a run;
    ``run_with_iobinding`` silently ignores adapters; and a `LoraAdapter` that Python has freed acts no more, silently,
    so keep the object. Servers that `oftfx.serving` writes keep to that.

    Args:
        model: the transformed model.
        path: the ``.onnx_adapter`` file.
        adapter: its name in the model.
        graph: the exported model, to check names and shapes against.

    Returns:
        The file.

    Raises:
        MissingExtraError: no onnxruntime with adapters.
        AdapterError: no adapter of that name.
        ExportError: it is more than rotations, or does not fit the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "Writing an ONNX adapter") from error
    if not hasattr(onnxruntime, "AdapterFormat"):
        raise ExportError(f"onnxruntime {onnxruntime.__version__} has no adapters; install 1.20 or later")
    blocks = {n: b.float().cpu() for n, b in adapter_blocks(model, adapter).items()}
    if bad := next((n for n, b in blocks.items() if not torch.isfinite(b).all()), None):
        raise ExportError(f"adapter {adapter!r}: {bad} is not finite")
    if graph is not None:
        check_fit(adapter, blocks, _swappable_inputs(Path(graph)))
    written = onnxruntime.AdapterFormat()
    written.set_adapter_version(VERSION)
    written.set_model_version(interface_of(model))
    written.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(b.numpy()) for n, b in sorted(blocks.items())})
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".part")
    written.export_adapter(str(partial))
    os.replace(partial, file)
    return file


def _swappable_inputs(graph: Path) -> dict[str, tuple[int, ...]]:
    import onnx

    if not graph.is_file():
        raise ExportError(f"{graph}: there is no such file")
    found = onnx.load(str(graph), load_external_data=False).graph
    shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in found.input}
    blocks = {n: s for n, s in shapes.items() if n.endswith(".blocks")}
    if not blocks:
        raise ExportError(f"{graph} has no swappable rotations; export it with adapters='swappable'")
    return blocks
