"""A tokenizer in GGUF's metadata, as llama.cpp computes it; one that it would compute otherwise is refused.

Two kinds of byte-pair tokenizers: over bytes as letters (GPT-2's, ``gpt2``), where the way of cutting words has a name
in llama.cpp; and over text with a piece for each left byte (SentencePiece's, ``llama``), where merges have scores.
Source: the keys of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the behaviour of llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.nn as nn

from oftfx.errors import ExportError, MissingExtraError

NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_GPT4 % "{1,3}",): "llama-bpe",
    (_GPT4 % "",): "qwen2",
}
"""llama.cpp's names of the ways to cut a text before it is encoded."""
_LOOKED_UP = {"Phi3ForCausalLM": ("<unk>", "<s>", "</s>", "<|endoftext|>")}
_PREFIX = "tokenizer.ggml."


def vocabulary(model: nn.Module, tokenizer: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Metadata of a tokenizer, and what llama.cpp does not do of it.

    Args:
        model: has the vocabulary's size and the tokens that end a text.
        tokenizer: a fast one of transformers, or its directory; None: no vocabulary.

    Raises:
        ExportError: llama.cpp does not have such a tokenizer, or it has more tokens than the model.
    """
    if tokenizer is None:
        return {f"{_PREFIX}model": "no_vocab"}, ()
    if isinstance(tokenizer, (str, Path)):
        tokenizer = _loaded(Path(tokenizer))
    if not getattr(tokenizer, "is_fast", False):
        raise _refused(tokenizer, "it has no tokenizer.json")
    config: Any = model.config
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _tokens(tokenizer, described, config.vocab_size)
    absent = [t for t in _LOOKED_UP.get(type(model).__name__, ()) if t not in tokens]
    if absent:
        raise _refused(tokenizer, f"for such a model llama.cpp looks up {absent[0]}, which it does not have")
    notes = list[str]()
    if described["model"].get("byte_fallback"):
        facts = _pieces(tokenizer, described, tokens, types)
    else:
        facts = _words(tokenizer, described, notes)
    found = {"tokens": tokens, "token_type": types, **facts, **_special(model, tokenizer, notes)}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        found["chat_template"] = template
    named = {f"{_PREFIX}{key}" if key != "chat_template" else f"tokenizer.{key}": v for key, v in found.items()}
    return named, tuple(notes)


def _loaded(directory: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "Reading a tokenizer") from error
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ExportError(f"tokenizer: {directory} has none that transformers reads: {error}") from error


def _refused(tokenizer: Any, reason: str) -> ExportError:
    return ExportError(
        f"tokenizer: llama.cpp would not compute this {type(tokenizer).__name__}: {reason}. Leave tokenizer out for a "
        "file that takes and gives token ids"
    )


def _tokens(tokenizer: Any, described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of each token; those that the model has beyond the tokenizer's are unused."""
    by_id = {i: t for t, i in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= size:
        raise _refused(tokenizer, f"it has tokens up to {max(by_id)}, and the model has {size}")
    special = {a["id"]: CONTROL if a["special"] else DEFINED for a in described["added_tokens"]}
    pieces = bool(described["model"].get("byte_fallback"))
    tokens, types = list[str](), list[int]()
    for index in range(size):
        text = by_id.get(index)
        kind = special.get(index, NORMAL) if text is not None else UNUSED
        if pieces and text is not None and _is_byte(text):
            kind = BYTE
        if pieces and text == described["model"].get("unk_token"):
            kind = UNKNOWN
        tokens.append(f"[PAD{index}]" if text is None else text)
        types.append(kind)
    return tokens, types


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _words(tokenizer: Any, described: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """GPT-2's kind."""
    model = described["model"]
    if model["type"] != "BPE":
        raise _refused(tokenizer, f"its model is {model['type']}, and only BPE is known here")
    cut = tuple(_cuts(tokenizer, described["pre_tokenizer"]))
    name = _CUTS.get(cut)
    if name is None:
        raise _refused(tokenizer, f"it cuts words by {cut}, for which no name of llama.cpp is known here")
    if bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise _refused(tokenizer, f"ignore_merges={model.get('ignore_merges')} with the cuts of {name!r}")
    normalizer = described["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refused(tokenizer, f"it normalizes text by {normalizer['type']}")
    if normalizer is not None:
        notes.append("llama.cpp does not compose Unicode (NFC) as this tokenizer does")
    return {"model": "gpt2", "pre": name, "merges": [_joined(m) for m in model["merges"]], "add_space_prefix": False}


def _joined(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _cuts(tokenizer: Any, step: dict[str, Any] | None) -> list[str]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [cut for inner in step["pretokenizers"] for cut in _cuts(tokenizer, inner)]
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return ["words"] if step.get("use_regex", True) else []
    if step["type"] == "Digits" and step["individual_digits"]:
        return ["digits"]
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return [step["pattern"].get("Regex", "?")]
    raise _refused(tokenizer, f"it cuts words by {step['type']} with settings that are not known here")


def _pieces(tokenizer: Any, described: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """SentencePiece's kind: llama.cpp joins the neighbours whose piece has the best score, whatever they are."""
    model = described["model"]
    prefix = _prefix(tokenizer, described)
    rank = dict[str, int]()
    pairs = set[tuple[str, str]]()
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made = left + right
        if made not in rank:
            rank[made] = len(rank)
        elif rank[made] != len(rank) - 1:
            raise _refused(tokenizer, f"the merges to {made!r} do not follow each other, so it has no one score")
        pairs.add((left, right))
    known = set(model["vocab"])
    for piece in rank:
        if absent := [c for c in piece if c not in known]:
            raise _refused(tokenizer, f"it has {piece!r} without a token for {absent[0]!r}")
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in known and right in known and (left, right) not in pairs:
                raise _refused(tokenizer, f"it does not merge {left!r} and {right!r}, as llama.cpp would")
    # What no merge makes is never joined; special tokens are found before.
    never = [0.0 if kind == CONTROL else -1e9 for kind in types]
    scores = [float(-rank[t]) if t in rank else least for t, least in zip(tokens, never, strict=True)]
    return {"model": "llama", "scores": scores, "add_space_prefix": prefix}


def _prefix(tokenizer: Any, described: dict[str, Any]) -> bool:
    """Whether a text gets a blank in front; blanks become ``▁`` in any case."""
    normalizer, cut = described["normalizer"], described["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if cut is None and steps in ([replaced], [{"type": "Prepend", "prepend": "▁"}, replaced]):
        return len(steps) == 2
    raise _refused(tokenizer, "it changes texts, or cuts them, in a way that is not known here")


def _special(model: nn.Module, tokenizer: Any, notes: list[str]) -> dict[str, Any]:
    """Tokens with a meaning, and which of them a text begins and ends with."""
    found = {
        f"{key}_token_id": value
        for key, value in (
            ("bos", tokenizer.bos_token_id),
            ("eos", tokenizer.eos_token_id),
            ("unknown", tokenizer.unk_token_id),
            ("padding", tokenizer.pad_token_id),
        )
        if value is not None
    }
    generation: Any = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    ends = list(dict.fromkeys([*ends, *([found["eos_token_id"]] if "eos_token_id" in found else [])]))
    if ends:
        found["eos_token_id"] = ends[0]
    if len(ends) > 1:
        found["eot_token_id"] = ends[1]
    if len(ends) > 2:
        notes.append(f"generation also ends at the tokens {ends[2:]}, which GGUF has no place for")
    around = tokenizer.build_inputs_with_special_tokens([]) if not tokenizer.is_fast else tokenizer("")["input_ids"]
    found["add_bos_token"] = around[:1] == [tokenizer.bos_token_id] and bool(around)
    found["add_eos_token"] = around[-1:] == [tokenizer.eos_token_id] and len(around) > found["add_bos_token"]
    if len(around) != found["add_bos_token"] + found["add_eos_token"]:
        raise _refused(tokenizer, f"it puts the tokens {around} around a text")
    return found
