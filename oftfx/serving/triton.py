"""A Triton model repository: ``config.pbtxt``, and the files that its Python backend runs."""

from __future__ import annotations

import json
import re
import shlex

from oftfx.errors import ExportError
from oftfx.serving.copied.runtime import ServedModel, Tensor
from oftfx.serving.options import Options, ServerFiles


def server_files(model: ServedModel, options: Options) -> ServerFiles:
    """Files of a model in a Triton repository.

    Raises:
        ExportError: Triton's ONNX Runtime backend is asked for, and the model chooses adapters, which that cannot do.
    """
    if options.backend == "onnxruntime" and model.mode in ("swappable", "mixed"):
        raise ExportError(
            f"{options.name}: Triton's ONNX Runtime backend cannot choose adapters, and the model is {model.mode!r}; "
            "use backend='python', or export it with adapters='fixed' or folded"
        )
    backend = options.backend or "python"
    python = {"model.py": "triton_model.py", "oftfx_runtime": "runtime"}
    host = shlex.quote(options.host)
    addresses = f"--http-address={host} --http-port={options.http_port} "
    addresses += f"--grpc-address={host} --grpc-port={options.grpc_port}"
    return ServerFiles(
        shared={f"{options.name}/config.pbtxt": config(model, backend, options)},
        own={},
        runtime=python if backend == "python" else {},
        backend=backend,
        command=f"tritonserver --model-repository={{out}} {addresses} --allow-metrics=false",
    )


def check(path: str, old: str, new: str) -> None:
    """One configuration holds for all versions, and it stays as it is there.

    Raises:
        ExportError: the new version has other inputs and outputs, or asks for other runs than that configuration says.
    """
    if _shared(old) != _shared(new):
        raise ExportError(
            f"{path}: the versions that are there have other inputs, outputs, batch size or backend; "
            f"write this model under another name\nthere:\n{_shared(old)}\nnew:\n{_shared(new)}"
        )
    there, asked = _runs(old), _runs(new)
    if differing := [what for what in asked if there[what] != asked[what]]:
        found = "; ".join(f"{w} is {there[w] or 'not set'} there and {asked[w] or 'not set'} here" for w in differing)
        raise ExportError(
            f"{path} holds for every version: {found}; give the same, edit the file, or write this model under another "
            "name"
        )


def _shared(text: str) -> str:
    """Everything above the first comment: name, backend, rows, inputs and outputs."""
    return re.split(r"^#", text, maxsplit=1, flags=re.MULTILINE)[0]


_END = "# How runs are made: by all versions alike."
_RUNS = {
    "preferred_batch_sizes": r"\bpreferred_batch_size\s*:\s*\[([^\]]*)\]",
    "max_queue_delay (microseconds)": r"\bmax_queue_delay_microseconds\s*:\s*(\d+)",
    "instances": r"\bcount\s*:\s*(\d+)",
    "threads": r'"(?:threads|intra_op_thread_count)"\s*,?\s*value\s*:?\s*\{\s*string_value\s*:\s*"(\d+)"',
}


def _runs(text: str) -> dict[str, str]:
    """What was asked of the runs, by option; anything else that was added by hand is not looked at."""
    text = re.sub(r"#.*", "", text.removeprefix(_shared(text)))
    return {what: " ".join(re.findall(r"\d+", " ".join(re.findall(each, text)))) for what, each in _RUNS.items()}


def config(model: ServedModel, backend: str, options: Options) -> str:
    """The text of ``config.pbtxt``.

    Args:
        model: batches are formed where it is `batched`, of two rows or more.
        backend: ``"python"`` or ``"onnxruntime"``.
        options: how it is served.
    """
    # At 0 Triton passes on each request alone, whatever its rows; at 1 it would refuse a second row.
    size = options.max_batch_size if model.batched and options.max_batch_size > 1 else 0
    lines = [f"name: {json.dumps(options.name)}", f"backend: {json.dumps(backend)}", f"max_batch_size: {size}"]
    for word, found in (("input", model.inputs), ("output", model.outputs)):
        lines += [f"{word} [", ",\n".join(_tensor(t, size > 0) for t in found), "]"]
    lines.append(_END)
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
