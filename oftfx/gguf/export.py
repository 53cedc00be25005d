"""Write a folded model as a GGUF file, and say what of it is not the model to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.checkpoints import quantized_layers
from oftfx.adapter.store import find_store, unwrapped
from oftfx.errors import ExportError, MissingExtraError
from oftfx.files import check_place, landing
from oftfx.formats.base import WeightFormat
from oftfx.formats.registry import format_of
from oftfx.gguf.encode import BLOCKS, FLOATS, Encoded, matrix, quantized_matrix, vector
from oftfx.gguf.families import Family, Metadata, angle_factors, family_of, metadata, reordered
from oftfx.gguf.vocabulary import vocabulary
from oftfx.placement.find import rotated_sites
from oftfx.terminal import bar

Type = Literal["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: in the file.
        source: in the model's ``state_dict``; of a quantized layer its path and ``.weight``.
        type: of GGUF.
        error: relative error of the weight that a reader gets, measured on the bytes; 0.0 where it is the same to the
            bit.
        note: what was kept, or not, where the error is not 0.
    """

    name: str
    source: str
    type: str
    error: float
    note: str = ""


@dataclass(frozen=True)
class GgufReport:
    """What was written.

    Attributes:
        path: the file.
        architecture: llama.cpp's name.
        tensors: see `GgufTensor`.
        nbytes: of the file.
        notes: what of the tokenizer a reader does not do.

    Examples:
        >>> import oftfx
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=33, max_position_embeddings=64, **sizes)).eval()
        >>> report = oftfx.export_gguf(model, "model.gguf", quantized="Q8_0")
        >>> report.architecture, report.types, report.lossless
        ('llama', {'F32': 5, 'Q8_0': 7}, False)
        >>> worst = max(report.tensors, key=lambda t: t.error)
        >>> worst.note, 0 < worst.error < 0.01
        ('rounded', True)
    """

    path: Path
    architecture: str
    tensors: tuple[GgufTensor, ...]
    nbytes: int
    notes: tuple[str, ...] = ()

    @property
    def types(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        return dict(sorted(Counter(t.type for t in self.tensors).items()))

    @property
    def lossless(self) -> bool:
        """Whether a reader gets every weight of the model to the bit."""
        return not any(t.error for t in self.tensors)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.types.items())
        lines = [f"{self.path}: {self.architecture}, {self.nbytes / 2**20:.1f} MiB, {kinds}"]
        by_note: dict[str, list[GgufTensor]] = {}
        for tensor in self.tensors:
            if tensor.error:
                by_note.setdefault(tensor.note, []).append(tensor)
        for note, changed in by_note.items():
            worst = max(changed, key=lambda t: t.error)
            lines.append(f"{len(changed)} tensors {note}: relative error up to {worst.error:.1e} ({worst.source})")
        return "\n".join([*lines, *(["every weight to the bit"] if self.lossless else []), *self.notes])


def export_gguf(
    model: nn.Module,
    path: str | Path,
    *,
    tokenizer: Any = None,
    quantized: Type | None = None,
    progress: bool | Callable[[int, int], None] = False,
) -> GgufReport:
    """Write a folded causal language model as a GGUF file, for llama.cpp and what reads its files.

    Norms and biases are float32. The rows of queries and keys are put in llama.cpp's order where it needs that. One
    matrix after another is encoded, measured and written.

    Args:
        model: plain or folded, of transformers: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2, Phi3.
        path: the ``.gguf`` file.
        tokenizer: of the model, or the directory that has it; None: a file without a vocabulary, which reads and gives
            token ids.
        quantized: None: to the bit; floats in their dtype, and quantized layers of integers in groups of a multiple of
            32 with the codes and scales that they store, as the first of ``Q4_0``, ``Q4_1`` and ``Q8_0`` that holds
            them. ``"F32"``, ``"F16"``, ``"BF16"``: every matrix as floats. ``"Q4_0"``, ``"Q4_1"``, ``"Q5_0"``,
            ``"Q5_1"``, ``"Q8_0"``: every linear layer but the head in this type; quantized ones keep their codes where
            they fit, all others are rounded to nearest. Embedding and head stay floats.
        progress: True for a progress bar (needs the ``report`` extra), or a function of (tensors done, all tensors).

    Returns:
        See `GgufReport`; it has the error of each tensor.

    Raises:
        MissingExtraError: the ``gguf`` extra is not installed.
        ExportError: the model has rotations, llama.cpp does not compute this model or its tokenizer, a layer does not
            fit, or the file cannot be written. What was there is as it was.

    Examples:
        >>> import oftfx
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=33, max_position_embeddings=64, **sizes)).eval()
        >>> report = oftfx.export_gguf(model, "model.gguf")
        >>> report.path.name, report.types, report.lossless
        ('model.gguf', {'F32': 12}, True)
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "A GGUF file") from error
    if quantized is not None and quantized not in (*FLOATS.values(), *BLOCKS):
        known = ", ".join(map(repr, (*FLOATS.values(), *BLOCKS)))
        raise ExportError(f"quantized: got {quantized!r}, expected None or one of {known}")
    path, model = Path(path), unwrapped(model)
    check_place(path, ExportError)
    _check_folded(model)
    family, config = family_of(model), model.config
    words, notes = vocabulary(model, tokenizer)
    sources = _sources(model, family)
    written = list[GgufTensor]()
    facts: Metadata = {
        # llama.cpp goes by some names: files of Phi-3 have to be called so, and others must not be.
        "general.name": type(model).__name__.removesuffix("ForCausalLM"),
        "general.quantization_version": 2,
    }
    # What is said of all tensors stands before the first, and the type of some is known only once they are encoded.
    with landing(path.parent, path.name, ExportError) as made:
        body = made.parent / "tensors"
        writer = gguf.GGUFWriter(made / path.name, family.arch)
        for key, value in (facts | metadata(family, config) | words).items():
            _put(writer, key, value)
        with bar("export_gguf") if progress is True else nullcontext(progress or None) as report_progress:
            with body.open("wb") as stream:
                for name, source, make in sources:
                    encoded = make(quantized)
                    _announce(writer, name, encoded)
                    stream.write(memoryview(encoded.data).cast("B"))
                    written.append(GgufTensor(name, source, encoded.type, encoded.error, encoded.note))
                    if report_progress is not None:
                        report_progress(len(written), len(sources))
            _put(writer, "general.file_type", _file_type(written))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        _copy(writer, body)
        writer.close()
        body.unlink()
        nbytes = (made / path.name).stat().st_size
    return GgufReport(path, family.arch, tuple(written), nbytes, notes)


_Source = tuple[str, str, Callable[[str | None], Encoded]]


def _check_folded(model: nn.Module) -> None:
    kept = next((fqn for fqn, placement in rotated_sites(model) if placement.fixed), None)
    store = find_store(model)
    if store is not None:
        raise ExportError(
            f"the model has adapters ({', '.join(store.adapters)}), which llama.cpp does not know; export "
            "oftfx.fold(model).model"
        )
    if kept is not None:
        raise ExportError(
            f"{kept} has a rotation in front of its weight (quantized='keep'), which llama.cpp does not know; fold "
            "with quantized='calibrate', 'requantize' or 'float'"
        )


def _sources(model: Any, family: Family) -> list[_Source]:
    """For each tensor its name in the file and in the model, and what encodes it."""
    import gguf

    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == family.arch)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found, layers = list[_Source](), quantized_layers(model)
    inside = tuple(f"{path}." for path in layers)
    plain = {k: v for k, v in model.state_dict().items() if not k.startswith(inside) or k.rpartition(".")[2] == "bias"}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    outer = {id(head), id(embedding)}
    modules = dict(model.named_modules())
    tied = "lm_head" not in layers and head.weight is embedding.weight
    if not tied and not family.head:
        raise ExportError(
            f"no GGUF of this {type(model).__name__}: llama.cpp's {family.arch!r} takes the embedding for the head, "
            "and this model has a head of its own (a fold on the head or the embedding parts them)"
        )
    for key, value in (*plain.items(), *((f"{path}.weight", layer) for path, layer in layers.items())):
        owner, _, last = key.rpartition(".")
        if tied and owner == "lm_head":
            continue
        name = names.get_name(owner)
        if name is None or last not in ("weight", "bias"):
            raise ExportError(f"{key} has no place in a GGUF of {family.arch!r}")
        free = id(modules.get(owner)) not in outer
        found.append((f"{name}.{last}", key, _encoder(model.config, family, key, value, free)))
    factors = angle_factors(model)
    if factors is not None:
        found.append(("rope_freqs.weight", "config.rope_parameters", lambda _: vector(factors)))
    return found


def _encoder(
    config: Any, family: Family, key: str, value: Tensor | nn.Module, free: bool
) -> Callable[[str | None], Encoded]:
    """From a type, or None, to the bytes; ``free``: the weight is no embedding and no head, and takes any type."""
    owner = key.rpartition(".")[0]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(owner.rpartition(".")[2])

    def encode(kind: str | None) -> Encoded:
        if isinstance(value, nn.Module):
            weight_format = format_of(value)
            assert isinstance(weight_format, WeightFormat)
            made = quantized_matrix(key, value, weight_format, kind)
        elif value.device.type == "meta":
            raise ExportError(f"{key} is on the device 'meta': the model is not loaded")
        elif value.dim() == 1:
            made = vector(value.float() + 1 if family.shifted and "norm" in owner else value)
        else:
            made = matrix(key, value, kind if free or kind not in BLOCKS else None)
        if heads and family.pairs:
            return replace(made, data=reordered(torch.from_numpy(made.data), heads).contiguous().numpy())
        return made

    return encode


def _announce(writer: Any, name: str, encoded: Encoded) -> None:
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[encoded.type]
    # With the dtype uint8 it would take the shape for one in bytes.
    writer.add_tensor_info(name, encoded.shape, np.dtype(np.float32), encoded.data.nbytes, kind)


def _copy(writer: Any, body: Path) -> None:
    """The tensors behind their descriptions, each where the next multiple of the alignment is."""
    import numpy as np

    with body.open("rb") as stream:
        for part in writer.tensors:
            for info in [*part.values()]:
                writer.write_tensor_data(np.frombuffer(stream.read(info.nbytes), np.uint8))


def _put(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _file_type(tensors: list[GgufTensor]) -> int:
    """llama.cpp shows it, and goes by the types of the tensors: that of most matrices."""
    import gguf

    kinds = Counter(t.type for t in tensors if t.source.endswith("_proj.weight"))
    (most, _), *_ = kinds.most_common(1)
    known = gguf.LlamaFileType
    return int(known.ALL_F32 if most == "F32" else known[f"MOSTLY_{most}"])
