"""A Triton model repository: ``config.pbtxt``, and the files that its Python backend runs."""

from __future__ import annotations

import json

from oftfx.errors import ExportError
from oftfx.serving.options import Layout, Options
from oftfx.serving.session import ServedModel, Tensor


def layout(model: ServedModel, options: Options) -> Layout:
    """Files of a model in a Triton repository.

    Raises:
        ExportError: Triton's ONNX Runtime backend is asked for, and the model chooses adapters, which that cannot do.
    """
    chooses = model.mode in ("swappable", "mixed")
    if options.backend == "onnxruntime" and chooses:
        raise ExportError(
            f"{options.name}: Triton's ONNX Runtime backend cannot choose adapters, and the model is {model.mode!r}; "
            "use backend='python', or export it with adapters='fixed' or folded"
        )
    backend = options.backend if options.backend != "auto" else ("python" if chooses else "onnxruntime")
    python = {"model.py": "triton_model.py", "oftfx_session.py": "session.py"}
    addresses = f"--http-address={options.host} --http-port={options.http_port} "
    addresses += f"--grpc-address={options.host} --grpc-port={options.grpc_port}"
    return Layout(
        shared={f"{options.name}/config.pbtxt": config(model, backend, options)},
        own={},
        runtime=python if backend == "python" else {},
        backend=backend,
        command=f"tritonserver --model-repository={{out}} {addresses} --allow-metrics=false",
    )


def check(path: str, old: str, new: str) -> None:
    """One configuration holds for all versions: another set of inputs and outputs would break those that are there.

    Raises:
        ExportError: it would.
    """
    if _shared(old) != _shared(new):
        raise ExportError(
            f"{path}: the versions that are there have other inputs, outputs, batch size or backend; "
            f"write this model under another name\nthere:\n{_shared(old)}\nnew:\n{_shared(new)}"
        )


def _shared(text: str) -> str:
    return text[: text.index(_END)] if _END in text else text


_END = "# Below may differ from version to version.\n"


def config(model: ServedModel, backend: str, options: Options) -> str:
    """The text of ``config.pbtxt``.

    Args:
        model: batches are formed where its inputs and outputs share their first axis.
        backend: ``"python"`` or ``"onnxruntime"``.
        options: how it is served.
    """
    size = options.max_batch_size if model.batched else 0
    lines = [f"name: {json.dumps(options.name)}", f"backend: {json.dumps(backend)}", f"max_batch_size: {size}"]
    for word, found in (("input", model.inputs), ("output", model.outputs)):
        lines += [f"{word} [", ",\n".join(_tensor(t, size > 0) for t in found), "]"]
    lines.append(_END.rstrip())
    if size:
        preferred = ", ".join(str(n) for n in options.preferred_batch_sizes)
        sizes = f"preferred_batch_size: [ {preferred} ] " if preferred else ""
        delay = round(options.max_queue_delay * 1e6)
        lines.append(f"dynamic_batching {{ {sizes}max_queue_delay_microseconds: {delay} }}")
    lines.append(f"instance_group [ {{ kind: KIND_CPU count: {options.instances} }} ]")
    lines.append("version_policy: { all { } }")
    if options.threads is not None:
        # The name that Triton's ONNX Runtime backend reads, or the one that our model.py reads.
        key = "intra_op_thread_count" if backend == "onnxruntime" else "threads"
        lines.append(f'parameters {{ key: "{key}" value: {{ string_value: "{options.threads}" }} }}')
    return "\n".join(lines) + "\n"


def _tensor(tensor: Tensor, batched: bool) -> str:
    datatype = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    shape = tensor.shape[1:] if batched else tensor.shape
    # Triton knows no tensor without axes: there is one of length 1 in the request, which Triton takes away.
    dims, reshape = (shape, "") if shape else ((1,), " reshape: { shape: [ ] }")
    lengths = ", ".join(str(n) for n in dims)
    return f"  {{ name: {json.dumps(tensor.name)} data_type: TYPE_{datatype} dims: [ {lengths} ]{reshape} }}"
