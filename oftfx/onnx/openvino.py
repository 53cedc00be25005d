"""A directory that OpenVINO GenAI loads: a graph that keeps its cache itself, tokenizer and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.store import find_store, unwrapped
from oftfx.errors import ExportError, MissingExtraError
from oftfx.files import landing, written_by
from oftfx.onnx.adapters import MODES
from oftfx.onnx.adapters.blocks import Slots, adapter_blocks
from oftfx.onnx.adapters.file import export_onnx_adapter
from oftfx.onnx.checks.verify import Verification, allowed_error, open_session
from oftfx.onnx.decoders.decoder import PAST, PRESENT, Decoder
from oftfx.onnx.export import ExportReport, exact_copy, export_onnx
from oftfx.precision import relative_error

GRAPH, WITH_INPUTS = "openvino_model.xml", "openvino_model_with_adapters.xml"
"""GenAI looks for the first name. It would feed nothing to inputs for blocks, and takes zeros then, silently."""
EXACT = {"EXECUTION_MODE_HINT": "ACCURACY"}
"""With it OpenVINO computes in floats; by itself it takes bfloat16 on processors that have it, and rounds the inputs of
4-bit layers to 8 bits."""


def export_openvino(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    adapters: Literal["fixed", "inputs"] = "fixed",
    verify: bool = True,
) -> ExportReport:
    """Write a causal language model as a directory for ``openvino_genai.LLMPipeline``.

    The graph is that of `export_onnx` with ``cache=True`` and ``dialect="openvino"``, with its cache as state:
    ``input_ids``, ``attention_mask``, ``position_ids`` int64 ``(batch, sequence)`` and ``beam_idx`` int32 ``(batch,)``
    go in, ``logits`` come out. For the model's own numbers the pipeline needs ``EXECUTION_MODE_HINT="ACCURACY"``: by
    itself OpenVINO takes bfloat16 on processors that have it.

    Args:
        model: folded, transformed or plain; a decoder of transformers.
        directory: made if it is not there; files of the same names are replaced, all at once.
        tokenizer: a fast one of transformers, which is converted; without one, the pipeline takes and gives token ids.
        adapters: ``"fixed"``: the active adapters are in the graph, ``openvino_model.xml``. ``"inputs"``: the blocks of
            an adapter are inputs ``<site>.oft.blocks``, and each adapter of the model is a file ``<name>.safetensors``
            of them; identity blocks are the base. The pipeline feeds no inputs of its own, so the graph has another
            name, ``openvino_model_with_adapters.xml``, and is run by `openvino` itself.
        verify: run the ONNX graph against torch, and OpenVINO's against that one.

    Returns:
        The report of the ONNX graph, with the checks in OpenVINO as well.

    Raises:
        MissingExtraError: the ``openvino`` extra is not installed.
        ExportError: the model cannot be exported, a graph does not compute what it does, or the directory cannot be
            written to. What was there is as it was.

    Examples:
        >>> import oftfx
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=33, max_position_embeddings=64, **sizes)).eval()
        >>> report = oftfx.export_openvino(model, "served")
        >>> report.path.name, report.checks[-1].case, report.checks[-1].relative_error < 1e-5
        ('openvino_model.xml', 'in OpenVINO', True)
        >>> sorted(f.name for f in report.path.parent.glob("*.json"))
        ['config.json', 'generation_config.json']
    """
    for package in ("openvino", *(["openvino_tokenizers"] if tokenizer is not None else [])):
        if find_spec(package) is None:
            raise MissingExtraError(package, "openvino", "A directory for OpenVINO")
    if adapters not in ("fixed", "inputs"):
        raise ExportError(
            f"adapters: got {adapters!r}, expected 'fixed' or 'inputs'; OpenVINO has no defaults of inputs"
        )
    import openvino

    model, directory = unwrapped(model), Path(directory)
    head = GRAPH if adapters == "fixed" else WITH_INPUTS
    store = find_store(model) if adapters == "inputs" else None
    if store is not None and len(store.active) == 1:
        slots = Slots.of(model, store.active[0])
        for name in store.adapters:
            adapter_blocks(model, name, slots)
    with landing(directory, head, ExportError) as made:
        onnx = made / "graph" / "model.onnx"
        inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)}
        report = export_onnx(model, onnx, inputs, adapters=adapters, cache=True, dialect="openvino", verify=verify)
        graph = stateful(openvino.Core().read_model(str(onnx)))
        if verify:
            report = replace(report, checks=(*report.checks, *_checked(model, onnx, graph, adapters)))
        with written_by("OpenVINO", made / head):
            openvino.save_model(graph, made / head, compress_to_fp16=False)
        for name in store.adapters if store is not None else ():
            export_onnx_adapter(model, made / f"{name}.safetensors", adapter=name, graph=onnx)
        del graph  # it reads the file
        for file in onnx.parent.iterdir():
            file.unlink()
        onnx.parent.rmdir()
        _settings(model, made)
        if tokenizer is not None:
            _tokenizer(tokenizer, made)
        nbytes = sum((made / head).with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin"))
    return replace(report, path=directory / head, nbytes=nbytes)


def stateful(graph: Any) -> Any:
    """A graph of `Decoder` whose cache is its own state, in the order of ``beam_idx``; it is changed.

    Args:
        graph: an ``openvino.Model``.
    """
    import numpy as np
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    beam = opset13.parameter([-1], dtype=np.int32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beam])
    names = {}
    for given in graph.inputs:
        name = given.get_any_name()
        if not name.startswith(PAST.partition(".")[0]):
            continue
        readers = given.get_target_inputs()
        chosen = opset13.gather(given, beam, opset13.constant(0, dtype=np.int64))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
        names[name] = name.replace(PAST.partition(".")[0], PRESENT.partition(".")[0])
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, names)
    return graph


def _checked(model: nn.Module, onnx: Path, graph: Any, adapters: str) -> list[Verification]:
    """A prompt and a step after it of two rows that have changed places, against the ONNX graph in ONNX Runtime.

    That one has been compared with torch.

    Raises:
        ExportError: they differ.
    """
    import numpy as np
    import openvino

    exact = exact_copy(model)
    blocks = {n: b.cpu().numpy() for n, b in getattr(MODES[adapters](exact, adapters), "blocks", {}).items()}
    whole = Decoder(exact, {}).fresh({"batch": 2, "sequence": 6, "past_sequence": 0}, 1, padded=False)
    (expected,) = open_session(onnx).run(["logits"], {n: v.cpu().numpy() for n, v in whole.items()} | blocks)
    request = openvino.Core().compile_model(graph, "CPU", EXACT).create_infer_request()
    checks = []
    for part, rows in ((slice(0, 5), (0, 1)), (slice(5, 6), (1, 0))):
        fed = _part(whole, part, rows) | {"beam_idx": np.array(rows, np.int32)} | blocks
        got = torch.from_numpy(np.array(request.infer(fed)["logits"]))
        wanted = torch.from_numpy(expected[list(rows)][:, part])
        error, bound = relative_error(got, wanted), allowed_error(wanted.dtype, 0.0)
        if not error <= bound:
            raise ExportError(
                f"in OpenVINO {openvino.__version__} the graph's logits are {error:.1e} from those in ONNX Runtime, "
                f"and {bound:.0e} is the bound; this is a fault of the graph or of that version"
            )
        shapes = {n: tuple(v.shape) for n, v in fed.items() if n not in blocks}
        checks.append(Verification(shapes, error, float((got - wanted).abs().max()), None, "in OpenVINO"))
    return checks


def _part(whole: Mapping[str, Tensor], part: slice, rows: tuple[int, ...]) -> dict[str, Any]:
    found = {}
    for name, value in whole.items():
        if name.startswith(PAST.partition(".")[0]):
            continue
        taken = value[:, : part.stop] if name == "attention_mask" else value[:, part]
        found[name] = taken[list(rows)].cpu().numpy()
    return found


def _settings(model: Any, directory: Path) -> None:
    """``config.json`` and ``generation_config.json``, from which the pipeline takes what ends a text."""
    if getattr(model, "config", None) is not None:
        model.config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)


def _tokenizer(tokenizer: Any, directory: Path) -> None:
    import openvino
    from openvino_tokenizers import convert_tokenizer

    tokenizer.save_pretrained(directory)
    made = convert_tokenizer(tokenizer, with_detokenizer=True)
    for graph, name in zip(made, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        with written_by("OpenVINO", directory / name):
            openvino.save_model(graph, directory / name)
