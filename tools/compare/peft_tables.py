"""The configurations that PEFT's own tests run its OFT with: from a checkout, or our list of the same.

A table there is a list of tuples with the class of a configuration and a dict of its fields; nothing of it is run, the
text is read. The models are stand-ins of the same shapes.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

CUSTOM = "tests/test_custom_models.py"
FAMILIES = {
    "tests/test_decoder_models.py": ("llama", "opt", "gpt2", "qwen2"),
    "tests/test_seq_classifier.py": ("bert classifier", "roberta classifier", "llama classifier"),
    "tests/test_encoder_decoder_models.py": ("t5", "bart"),
    "tests/test_feature_extraction_models.py": ("bert", "roberta"),
}


@dataclass(frozen=True)
class Row:
    """One configuration on one model.

    Attributes:
        name: for the report.
        model: which of `MODELS`.
        config: fields of PEFT's `OFTConfig`.
    """

    name: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)


def read(checkout: Path) -> list[Row]:
    """The rows of a PEFT checkout."""
    rows = [
        Row(name, model, config)
        for before, config in _tables(checkout / CUSTOM)
        if len(before) == 2 and (name := before[0]) and (model := before[1]) in MODELS
    ]
    for path, models in FAMILIES.items():
        for number, (_, config) in enumerate(_tables(checkout / path)):
            rows += [Row(f"{model} {number}", model, config) for model in models]
    return rows


def _tables(path: Path) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What stands before an ``OFTConfig`` in a tuple of literals, and the one dict after it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Tuple):
            at = [i for i, e in enumerate(node.elts) if isinstance(e, ast.Name) and e.id == "OFTConfig"]
            if at and len(node.elts) == at[0] + 2 and isinstance(node.elts[-1], ast.Dict):
                yield tuple(map(ast.literal_eval, node.elts[: at[0]])), ast.literal_eval(node.elts[-1])


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.drop, self.lin1 = nn.Linear(10, 20), nn.Dropout(0.5), nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.lin0(x.to(self.lin0.weight.dtype)).relu())
        return self.lin1(hidden).log_softmax(-1)


class EmbConv1D(nn.Module):
    """An embedding, GPT-2's layer, a head."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 5), Conv1D(1, 5), nn.Linear(10, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin0(self.conv1d(self.emb(ids)).relu().flatten(1)).log_softmax(-1)


class Conv2d(nn.Module):
    """A kernel as large as its input, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d, self.lin0 = nn.Conv2d(5, 10, 3), nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pictures = x.to(self.lin0.weight.dtype).reshape(-1, 5, 3, 3)
        return self.lin0(self.conv2d(pictures).relu().flatten(1)).log_softmax(-1)


def _transformer(auto: str, model_type: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        sizes = {"vocab_size": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
        config = transformers.AutoConfig.for_model(model_type, **sizes, **more)
        return getattr(transformers, f"AutoModel{auto}").from_config(config)

    return build


_BERT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
_OPT = {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 64, "max_position_embeddings": 32}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
_BART = {"d_model": 64, "max_position_embeddings": 32}
_BART |= {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in _SIDE.items()}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": Mlp,
    "EmbConv1D": EmbConv1D,
    "Conv2d": Conv2d,
    "llama": _transformer("ForCausalLM", "llama", **_BERT),
    "opt": _transformer("ForCausalLM", "opt", **_OPT),
    "gpt2": _transformer("ForCausalLM", "gpt2", **_GPT2),
    "qwen2": _transformer("ForCausalLM", "qwen2", **_BERT, num_key_value_heads=2),
    "bert classifier": _transformer("ForSequenceClassification", "bert", **_BERT),
    "roberta classifier": _transformer("ForSequenceClassification", "roberta", **_BERT),
    "llama classifier": _transformer("ForSequenceClassification", "llama", **_BERT),
    "t5": _transformer("ForSeq2SeqLM", "t5", **_T5),
    "bart": _transformer("ForSeq2SeqLM", "bart", **_BART),
    "bert": _transformer("", "bert", **_BERT),
    "roberta": _transformer("", "roberta", **_BERT),
}


def build(name: str) -> nn.Module:
    """The model of a row, the same at every call, in eval mode."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    """By the names of its forward."""
    if name == "MLP":
        return {"x": torch.arange(90).view(9, 10) / 30}
    if name == "EmbConv1D":
        return {"ids": torch.arange(90).view(9, 10)}
    if name == "Conv2d":
        return {"x": torch.arange(90).view(2, 45) / 30}
    ids = torch.arange(4, 20).view(2, 8)
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if name in ("t5", "bart") else {})}


def _mlp(number: int, **changes: Any) -> Row:
    size = {"r": 2, "oft_block_size": 0} if number < 10 else {"r": 0, "oft_block_size": 2}
    return Row(f"Vanilla MLP {number} OFT", "MLP", {**size, "target_modules": ["lin0"], **changes})


_EXACT = {"use_cayley_neumann": False}
_COFT = {"coft": True, "eps": 1e-2}
_SHARE = {"block_share": True}
_EMB = {"r": 1, "oft_block_size": 0, "target_modules": ["emb"]}
_CONV = {"r": 5, "oft_block_size": 0, "target_modules": ["conv2d"]}
_TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
ROWS = [
    _mlp(1, target_modules="lin0", **_EXACT),
    _mlp(2, **_EXACT),
    _mlp(5, modules_to_save=["lin1"], **_EXACT),
    _mlp(6, module_dropout=0.1, **_EXACT),
    _mlp(7, **_COFT),
    _mlp(8, **_SHARE, **_EXACT),
    _mlp(9, **_COFT, **_SHARE),
    _mlp(10, use_cayley_neumann=True),
    _mlp(11, **_EXACT),
    _mlp(12, **_COFT, **_SHARE, use_cayley_neumann=True),
    _mlp(13, **_COFT, **_SHARE, **_EXACT),
    Row("Embedding + transformers Conv1D 1 OFT", "EmbConv1D", _EMB),
    Row("Embedding + transformers Conv1D 2 OFT", "EmbConv1D", {**_EMB, **_SHARE}),
    Row("Conv2d 1 OFT", "Conv2d", _CONV),
    Row("Conv2d 3 OFT", "Conv2d", {**_CONV, "coft": True}),
    Row("Conv2d 4 OFT", "Conv2d", {**_CONV, **_SHARE}),
    Row("Conv2d 5 OFT", "Conv2d", {**_CONV, "coft": True, **_SHARE}),
    *(
        Row(f"{model} 0", model, {"task_type": task, "target_modules": None})
        for task, models in zip(_TASKS, FAMILIES.values(), strict=True)
        for model in models
    ),
]
"""Facts of peft's tests at the version that is compared; `read` gives the same of a checkout."""
