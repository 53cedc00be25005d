"""Examples from a file: text in a row, conversations, prompts with their completions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from oftfx.errors import OftfxError
from oftfx.streaming.texts import blocks, read_texts
from oftfx.training.examples import IGNORED, Examples, Row
from oftfx.typed_json import parsed


class DataError(OftfxError, ValueError):
    """A file of examples cannot be used."""


def read_examples(file: Path, tokenizer: Any, length: int) -> Examples:
    """Rows of a file.

    Plain text, and ``.jsonl`` whose lines have ``"text"``: one text after the other, each ended by the tokenizer's end
    token, cut into rows of ``length``; every token is learnt. Lines with ``"messages"``: a row each by the tokenizer's
    chat template, of which the assistant's turns are learnt. Lines with ``"prompt"`` and ``"completion"``: a row each,
    of which the completion is learnt. What is longer than ``length`` is cut, and the remarks say how often.

    Args:
        file: the file.
        tokenizer: of the model, as transformers has it.
        length: tokens of a row at most.

    Raises:
        DataError: a line is none of these, kinds are mixed, or there is nothing to learn.
        FoldError: the file cannot be read.
    """
    kinds = _kinds(file) if file.suffix == ".jsonl" else {"text"}
    if len(kinds) > 1:
        raise DataError(f"{file}: its lines are of several kinds, {' and '.join(sorted(kinds))}; use a file for each")
    if kinds == {"text"}:
        found = blocks(tokenizer, read_texts(file, tokenizer), length)
        if not len(found):
            raise DataError(f"{file}: less than one row of {length} tokens is in it; use more text, or shorter rows")
        return Examples([Row(ids, ids) for ids in found], _pad(tokenizer))
    row = _conversation if kinds == {"messages"} else _completion
    rows, remarks = [], Counter[str]()
    for number, line in _lines(file):
        try:
            ids, learnt = row(parsed(line), tokenizer)
        except Exception as error:  # a chat template is a program of its own
            raise DataError(f"{file}, line {number}: {error}") from error
        if len(ids) > length:
            remarks[f"cut to {length} tokens"] += 1
        labels = [i if on else IGNORED for i, on in zip(ids, learnt, strict=True)][:length]
        if all(label == IGNORED for label in labels[1:]):
            remarks["left out, for nothing in them is learnt"] += 1
            continue
        rows.append(Row(torch.tensor(ids[:length]), torch.tensor(labels)))
    if not rows:
        raise DataError(f"{file}: there is nothing to learn in its first {length} tokens a row")
    said = tuple(f"{count} of {sum(1 for _ in _lines(file))} rows {what}" for what, count in remarks.items())
    return Examples(rows, _pad(tokenizer), said)


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as text: {error}") from error
    return [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def _kinds(file: Path) -> set[str]:
    found = set()
    for number, line in _lines(file):
        try:
            entry = parsed(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not JSON: {error}") from error
        known = [k for k in ("text", "messages", "prompt") if isinstance(entry, dict) and k in entry]
        if not known or (known[0] == "prompt" and not isinstance(entry.get("completion"), str)):
            raise DataError(
                f'{file}, line {number}: expected an object with "text", "messages", or "prompt" and "completion"'
            )
        found.add("prompts" if known[0] == "prompt" else known[0])
    return found


def _conversation(entry: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them an assistant says.

    What the template makes of the messages before a turn, with the sign that an answer follows, has to be the beginning
    of what it makes of them and the turn.
    """
    messages = entry["messages"]

    def ids(count: int, ask: bool) -> list[int]:
        made = tokenizer.apply_chat_template(messages[:count], add_generation_prompt=ask, tokenize=False)
        return list(tokenizer(made, add_special_tokens=False)["input_ids"])

    whole = ids(len(messages), False)
    learnt = [False] * len(whole)
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before, after = ids(i, True), ids(i + 1, False)
        if whole[: len(after)] != after or after[: len(before)] != before:
            raise ValueError(
                f"the chat template does not put turn {i + 1} behind what it makes of the turns before, so it cannot "
                'be told which tokens are the answer; write the texts out and give them as "prompt" and "completion"'
            )
        learnt[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, learnt


def _completion(entry: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    prompt = list(tokenizer(entry["prompt"])["input_ids"])
    completion = list(tokenizer(entry["completion"], add_special_tokens=False)["input_ids"])
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [*prompt, *completion, *end]
    return ids, [i >= len(prompt) for i in range(len(ids))]


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
