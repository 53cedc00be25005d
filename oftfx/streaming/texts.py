"""Calibration inputs from a file of texts, by the checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftfx.errors import FoldError, MissingExtraError, warn
from oftfx.typed_json import is_text, parsed

BATCH = 4
"""Sequences that go through the model at a time."""


def read_texts(file: Path, tokenizer: Any) -> list[str]:
    """The texts of a file, in their order.

    ``.jsonl``: a JSON object a line, with ``"text"``, or with ``"messages"``, which the tokenizer's chat template puts
    together. Any other file: plain text in UTF-8, where an empty line ends a text.

    Raises:
        FoldError: there is no such file, a line is neither, or nothing is in it.
    """
    try:
        whole = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FoldError(f"{file}: cannot be read as text: {error}") from error
    if file.suffix == ".jsonl":
        lines = enumerate(whole.splitlines(), 1)
        found = [_text_of(line, f"{file}, line {number}", tokenizer) for number, line in lines if line.strip()]
    else:
        found = [part.strip() for part in whole.replace("\r\n", "\n").split("\n\n")]
    texts = [t for t in found if t]
    if not texts:
        raise FoldError(f"{file}: there is no text in it")
    return texts


def blocks(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """All texts in a row, cut into ``(n, length)`` token ids; a rest shorter than a block is left out."""
    end = tokenizer.eos_token_id
    stream = [t for text in texts for t in (*tokenizer(text)["input_ids"], *([] if end is None else [end]))]
    count = len(stream) // length
    return torch.tensor(stream[: count * length], dtype=torch.long).view(count, length)


def calibration_from(base: Path, file: Path, tokens: int, length: int) -> list[dict[str, Tensor]]:
    """Inputs for ``"calibrate"``: sequences of ``length`` tokens, so many that they are ``tokens`` together.

    Args:
        base: a checkpoint directory with its tokenizer.
        file: see `read_texts`.
        tokens: how many to use; a file that has less is used whole, with a warning.
        length: of a sequence.

    Raises:
        MissingExtraError: transformers is not installed.
        FoldError: the directory has no tokenizer, or the file not enough text for one sequence.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "Reading calibration texts") from error
    if length < 1 or tokens < length:
        raise FoldError(f"tokens: got {tokens} in sequences of {length}; there has to be one sequence at least")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise FoldError(f"{base}: no tokenizer can be loaded from it: {error}") from error
    found = blocks(tokenizer, read_texts(file, tokenizer), length)
    if not len(found):
        raise FoldError(
            f"{file}: there is less than one sequence of {length} tokens in it; use more text, or shorter ones"
        )
    wanted = tokens // length
    if len(found) < wanted:
        warn(f"{file}: it has {len(found) * length:,} tokens in sequences of {length}, of the {tokens:,} asked for")
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in found[:wanted].split(BATCH)]


def _text_of(line: str, where: str, tokenizer: Any) -> str:
    try:
        entry = parsed(line)
    except ValueError as error:
        raise FoldError(f"{where}: not JSON: {error}") from error
    if isinstance(entry, dict) and is_text(entry.get("text")):
        return str(entry["text"])
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
        try:
            return str(tokenizer.apply_chat_template(entry["messages"], tokenize=False))
        except Exception as error:  # a template is a program of its own
            raise FoldError(f"{where}: the tokenizer's chat template does not take these messages: {error}") from error
    raise FoldError(f'{where}: expected an object with "text" or "messages"')
