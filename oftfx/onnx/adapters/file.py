"""Write one adapter as the file that ONNX Runtime's adapter interface loads."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn as nn

from oftfx.adapter.store import unwrapped
from oftfx.errors import ExportError, MissingExtraError
from oftfx.files import landing, write_whole, written_by
from oftfx.onnx.adapters.blocks import Slots, adapter_blocks
from oftfx.onnx.adapters.model_number import interface_of
from oftfx.serving.copied.runtime.contract import INTERFACE, MODEL, ROTATIONS
from oftfx.typed_json import made, parsed

VERSION = 1


def export_onnx_adapter(
    model: nn.Module, path: str | Path, *, adapter: str = "default", graph: str | Path | None = None
) -> Path:
    """Write an adapter for graphs that were exported with ``adapters="swappable"``.

    The file holds the blocks ``R (blocks, b, b)`` in the dtype of the graph's inputs (float32, or float64 in models of
    float64) under their names,
    ``<site>.oft.blocks``; the Cayley transform has been computed. Sites that the adapter does not rotate stay at the
    identity. ONNX Runtime loads it with ``LoraAdapter().Load(path)`` (1.20 or later) and applies it to one request with
    ``RunOptions().add_active_adapter``. Of two adapters that overlap it silently takes the first, so one adapter a run;
    ``run_with_iobinding`` silently ignores adapters; and a `LoraAdapter` that Python has freed acts no more, silently,
    so keep the object. Servers that `oftfx.serving` writes keep to that.

    Runtimes without such an interface (ONNX Runtime Web, OpenVINO) are fed the blocks as inputs, of graphs that were
    exported with ``adapters="inputs"``; a path that ends with ``.safetensors`` gets them in that format.

    Args:
        model: the transformed model.
        path: the ``.onnx_adapter`` or ``.safetensors`` file.
        adapter: its name in the model.
        graph: the exported model, to fit the adapter to: needed where the adapter rotates fewer sites than the graph,
            or shares its rotations otherwise. Without it, the file fits graphs that were made from this adapter or one
            of the same rules.

    Returns:
        The file.

    Raises:
        MissingExtraError: no onnxruntime with adapters.
        AdapterError: no adapter of that name.
        ExportError: it is more than rotations, does not fit the graph, or the file cannot be written.

    Examples:
        >>> import onnxruntime, oftfx, torch
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3)})
        >>> file = oftfx.export_onnx_adapter(model, "news.onnx_adapter")
        >>> held = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
        >>> {name: value.shape() for name, value in held.items()}
        {'0.oft.blocks': [2, 3, 3]}
    """
    file = Path(path)
    plain = file.suffix == ".safetensors"
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "Writing an ONNX adapter") from error
    if not plain and not hasattr(onnxruntime, "AdapterFormat"):
        raise ExportError(f"onnxruntime {onnxruntime.__version__} has no adapters; install 1.20 or later")
    slots = Slots.of(model, adapter) if graph is None else _slots_of(Path(graph), model)
    blocks = {n: b.cpu() for n, b in adapter_blocks(model, adapter, slots).items()}
    if bad := next((n for n, b in blocks.items() if not torch.isfinite(b).all()), None):
        raise ExportError(f"adapter {adapter!r}: {bad} is not finite")
    if plain:
        from safetensors.torch import save

        made_for = {INTERFACE: str(interface_of(model, slots.names))}
        write_whole(file, save({n: b.contiguous() for n, b in sorted(blocks.items())}, made_for), ExportError)
        return file
    written = onnxruntime.AdapterFormat()
    written.set_adapter_version(VERSION)
    written.set_model_version(interface_of(model, slots.names))
    written.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(b.numpy()) for n, b in sorted(blocks.items())})
    with landing(file.parent, file.name, ExportError) as made, written_by("ONNX Runtime", made / file.name):
        written.export_adapter(str(made / file.name))
    return file


def _slots_of(graph: Path, model: nn.Module) -> Slots:
    import onnx

    if not graph.is_file():
        raise ExportError(f"{graph}: there is no such file")
    try:
        found = onnx.load(str(graph), load_external_data=False)
    except Exception as error:  # protobuf's own types
        raise ExportError(f"{graph} is not an ONNX file, or is damaged: {type(error).__name__}") from None
    notes = {entry.key: entry.value for entry in found.metadata_props}
    if ROTATIONS not in notes:
        raise ExportError(f"{graph} has no swappable rotations; export it with adapters='swappable'")
    try:
        names = made(dict[str, str], parsed(notes[ROTATIONS]), ROTATIONS)
        notes[INTERFACE], notes[MODEL]
    except (ValueError, KeyError) as error:
        raise ExportError(f"{graph} is damaged: what it says of its rotations cannot be read: {error}") from None
    if str(interface_of(model, names)) != notes[INTERFACE]:
        raise ExportError(
            f"{graph} was exported from another model: {notes[MODEL]} with other layers or weights than this "
            f"{type(unwrapped(model)).__name__}"
        )
    inputs = {i.name: i.type.tensor_type for i in found.graph.input if i.name in names.values()}
    shapes = {n: tuple(d.dim_value for d in t.shape.dim) for n, t in inputs.items()}
    wide = any(t.elem_type == onnx.TensorProto.DOUBLE for t in inputs.values())
    return Slots(names, shapes, torch.float64 if wide else torch.float32)
