"""A directory that ONNX Runtime GenAI loads: graph, settings, tokenizer, and a file for each adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch.nn as nn

from oftfx.adapter.store import find_store, unwrapped
from oftfx.errors import ExportError
from oftfx.files import landing, write
from oftfx.onnx.adapters.blocks import Slots, adapter_blocks
from oftfx.onnx.adapters.file import export_onnx_adapter
from oftfx.onnx.decoders.decoder import PAST, PRESENT, Decoder
from oftfx.onnx.decoders.fused import OPERATOR
from oftfx.onnx.export import ExportReport, exact_copy, export_onnx
from oftfx.serving.copied.runtime.contract import SUFFIX

GRAPH, CONFIG = "model.onnx", "genai_config.json"


def export_genai(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    adapters: Literal["fixed", "swappable"] = "fixed",
    context_length: int | None = None,
    fused: bool | None = None,
    accuracy_level: int | None = None,
    opset: int | None = None,
    verify: bool = True,
) -> ExportReport:
    """Write a causal language model as a directory for ``onnxruntime_genai.Model``.

    The directory gets ``model.onnx`` (`export_onnx` with ``cache=True``), ``genai_config.json``, the tokenizer's files,
    and with ``adapters="swappable"`` an ``<name>.onnx_adapter`` for each adapter of the model:
    ``onnxruntime_genai.Adapters(model).load(file, name)``, then ``generator.set_active_adapter(adapters, name)``.
    Without an active adapter the base model generates.

    Args:
        model: folded, transformed or plain; a decoder of transformers.
        directory: made if it is not there; files of the same names are replaced, all at once.
        tokenizer: of the model; without one, GenAI takes and gives token ids.
        adapters: the active adapters in the graph, or all of them beside it. GenAI feeds no other inputs, so the other
            modes of `export_onnx` are not for it.
        context_length: largest number of tokens; the config's ``max_position_embeddings`` where None.
        fused: see `export_onnx`; None: attention in one operator where the model's is what that computes, and its cache
            is one buffer of ``max_length`` that GenAI keeps. A batch of prompts is padded on the right then. The
            report says what came of it.
        accuracy_level: see `export_onnx`.
        opset: see `export_onnx`.
        verify: see `export_onnx`.

    Returns:
        The report of ``model.onnx``.

    Raises:
        MissingExtraError: the ``onnx`` extra is not installed.
        ExportError: the model cannot be exported, an adapter does not fit the graph, the settings are not known, or the
            directory cannot be written to. What was there is as it was.

    Examples:
        >>> import oftfx
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=33, max_position_embeddings=64, **sizes)).eval()
        >>> report = oftfx.export_genai(model, "served")
        >>> sorted(file.name for file in report.path.parent.iterdir())
        ['genai_config.json', 'model.onnx']
    """
    if adapters not in ("fixed", "swappable"):
        raise ExportError(f"adapters: got {adapters!r}, expected 'fixed' or 'swappable'; GenAI feeds no other inputs")
    model, directory = unwrapped(model), Path(directory)
    config = genai_config(model, tokenizer, context_length)
    fused, too_long = _within_tables(model, config["model"]["context_length"], fused)
    store = find_store(model) if adapters == "swappable" else None
    if store is not None and len(store.active) == 1:
        slots = Slots.of(model, store.active[0])
        for name in store.adapters:
            adapter_blocks(model, name, slots)
    # Without its settings a directory does not load, so half of another model is never taken for a whole one.
    with landing(directory, CONFIG, ExportError, stale=[f"{GRAPH}.data"]) as made:
        report = export_onnx(
            model,
            made / GRAPH,
            _inputs(model),
            adapters=adapters,
            cache=True,
            fused=fused,
            accuracy_level=accuracy_level,
            opset=opset,
            verify=verify,
        )
        if report.attention == OPERATOR:
            decoder = config["model"]["decoder"]
            decoder["inputs"] = {n: v for n, v in decoder["inputs"].items() if n in report.inputs or "%d" in v}
            config["search"]["past_present_share_buffer"] = True
        for name in store.adapters if store is not None else ():
            export_onnx_adapter(model, made / f"{name}{SUFFIX}", adapter=name, graph=made / GRAPH)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        write(made / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return replace(report, path=directory / GRAPH, attention=too_long or report.attention)


def genai_config(model: nn.Module, tokenizer: Any = None, context_length: int | None = None) -> dict[str, Any]:
    """What ``genai_config.json`` says: names of inputs and outputs, sizes, special tokens, how to search.

    Special tokens and the search are those of the model's generation config, then of its config, then of the tokenizer.

    Raises:
        ExportError: the model is no decoder, its layers have caches of several sizes, or a setting is not known.
    """
    signature = Decoder(exact_copy(model), {})
    sizes = {shape for pair in signature.layers for shape in pair}
    if len(sizes) > 1:
        raise ExportError(
            f"{type(model).__name__}: keys and values have the sizes (heads, head) {sorted(sizes)}; GenAI knows one "
            "for all layers. Export it with export_onnx(cache=True)"
        )
    ((heads, head),) = sizes
    whole: Any = model.config
    config, generation = whole.get_text_config(decoder=True), getattr(model, "generation_config", None)

    def setting(name: str, default: Any = None) -> Any:
        found = (getattr(source, name, None) for source in (generation, config, tokenizer))
        return next((value for value in found if value is not None), default)

    context = context_length or getattr(config, "max_position_embeddings", None)
    if context is None:
        raise ExportError(f"{type(model).__name__}: its config has no max_position_embeddings; pass context_length")
    end = setting("eos_token_id")
    if end is None:
        raise ExportError(
            f"{type(model).__name__} has no eos_token_id, with which GenAI stops; set "
            "model.generation_config.eos_token_id"
        )
    first = end[0] if isinstance(end, (list, tuple)) else end
    cache = {
        side: {f"{side}_{kind}_names": names.format("%d", kind) for kind in ("key", "value")}
        for side, names in (("past", PAST), ("present", PRESENT))
    }
    tokens = {n: n for n in signature.inputs if not n.startswith("past_key_values.")}
    return {
        "model": {
            # GenAI's name for any decoder with keys and values; its other names add what single families need.
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": context,
            "bos_token_id": setting("bos_token_id", first),
            "eos_token_id": list(end) if isinstance(end, (list, tuple)) else end,
            "pad_token_id": setting("pad_token_id", first),
            "decoder": {
                "filename": GRAPH,
                # 3: errors. ONNX Runtime would warn of every swappable rotation that it is no constant.
                "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": head,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": len(signature.layers),
                "inputs": {**tokens, **cache["past"]},
                "outputs": {"logits": "logits", **cache["present"]},
            },
        },
        "search": {
            "max_length": context,
            "do_sample": bool(setting("do_sample", False)),
            "num_beams": setting("num_beams", 1),
            "temperature": setting("temperature", 1.0),
            "top_k": setting("top_k", 50),
            "top_p": setting("top_p", 1.0),
            "repetition_penalty": setting("repetition_penalty", 1.0),
            # In plain operators a graph makes the longer cache anew; it does not write into the shorter one.
            "past_present_share_buffer": False,
        },
    }


def _within_tables(model: nn.Module, context: int, fused: bool | None) -> tuple[bool | None, str]:
    """What ``fused`` becomes, and why: the operator rotates by tables as long as the config's positions."""
    whole: Any = model.config
    positions = getattr(whole.get_text_config(decoder=True), "max_position_embeddings", None) or context
    if fused is False or context <= positions:
        return fused, ""
    reason = f"context_length={context} is over the config's max_position_embeddings={positions}"
    if fused:
        raise ExportError(f"fused=True: {reason}, for which the operator has tables; leave one of the two out")
    return False, f"in plain operators: {reason}"


def _inputs(model: nn.Module) -> dict[str, Any]:
    import torch

    device = next(model.parameters()).device
    return {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device)}
