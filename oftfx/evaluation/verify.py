"""Hold a checkpoint, an ONNX file or a running server against the base with its adapter, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oftfx.adapter.load import load_adapter
from oftfx.adapter.switch import disable_adapters
from oftfx.errors import OftfxError
from oftfx.evaluation.graphs import graph_logits
from oftfx.evaluation.served import OpenAIServer, connect
from oftfx.evaluation.tokens import Bare, Expected, Followed, bare, follow, follow_tokens, greedy
from oftfx.evaluation.verdicts import Verification
from oftfx.opened import check_model, open_model, open_tokenizer

PROMPTS = (
    "The weather in the north of the country",
    "def fibonacci(n):",
    "Once upon a time there was a",
    "Question: What is a rotation matrix?\nAnswer:",
)
_NAME = "verified"
Ask = Callable[[Expected, Bare | None], Followed]


def verify(
    subject: str | Path,
    base: Path,
    adapter: Path | None,
    *,
    model: str = "",
    served_adapter: str = "",
    adapter_file: Path | None = None,
    prompts: Sequence[str] = (),
    count: int = 32,
    tie: float = 1e-3,
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare greedy tokens.

    Args:
        subject: a checkpoint directory, an ``.onnx`` file, or the URL of a server.
        base: directory of the model it was made of.
        adapter: directory of the adapter that should be in it; None: it should be the base.
        model: of a server: the model's name there.
        served_adapter: of a server: the name by which a request chooses the adapter.
        adapter_file: of a swappable ``.onnx`` file: the ``.onnx_adapter`` to run it with.
        prompts: texts; `PROMPTS` where none is given.
        count: tokens after each.
        tie: margins below this may be decided by rounding.
        dtype: of the base here.
        progress: called with (prompts done, all).

    Raises:
        OftfxError: something cannot be opened, or has another vocabulary.
    """
    tokenizer, texts = open_tokenizer(base), [*(prompts or PROMPTS)]
    ids = [tokenizer(t)["input_ids"] or [tokenizer.eos_token_id or 0] for t in texts]
    show, total = progress or (lambda *_: None), 2 * len(ids)
    ask, what, by_tokens = _asking(subject, model, served_adapter, adapter_file)
    reference = open_model(base, dtype=dtype)
    own: list[Expected | None] = [None] * len(ids)
    if by_tokens and adapter is not None:
        own = [greedy(reference, prompt, count) for prompt in ids]
    if adapter is not None:
        load_adapter(reference, adapter, adapter=_NAME)
    expected = []
    for done, prompt in enumerate(ids, 1):
        expected.append(greedy(reference, prompt, count))
        show(done, total)
    bases: list[Bare | None] = [None] * len(ids)
    if adapter is not None:
        with disable_adapters(reference):
            bases = [bare(reference, o, e) for o, e in zip(own, expected, strict=True)]
    rows, words = [], []
    for done, (want, without, text) in enumerate(zip(expected, bases, texts, strict=True), len(ids) + 1):
        row = ask(want, without)
        rows.append(row)
        place = row.same
        words.append((text, _word(tokenizer, want.tokens, row, place), _word(tokenizer, row.tokens, row, place)))
        show(done, total)
    against = f"{base.name}" + ("" if adapter is None else f" with {adapter.name}")
    return Verification(what, against, tuple(rows), tuple(words), tie)


def _asking(subject: str | Path, model: str, served_adapter: str, adapter_file: Path | None) -> tuple[Ask, str, bool]:
    """How to ask, the name of what is asked, and whether it answers in tokens only."""
    text = str(subject)
    if text.startswith(("http://", "https://")):
        server = connect(text, model=model, adapter=served_adapter)
        name = f"{text} ({server.model}{f', adapter {served_adapter}' if served_adapter else ''})"
        if isinstance(server, OpenAIServer):
            return lambda e, b: follow_tokens(e, server.tokens(e.prompt, len(e.tokens)), b), name, True
        return lambda e, b: follow(e, _checked(server.logits(e.whole), e, name), b), name, False
    if model or served_adapter:
        raise OftfxError(f"{text} is no server; --model and --served-adapter are for one (http://HOST:PORT)")
    path = Path(subject)
    if path.suffix == ".onnx" or (path / "genai_config.json").is_file():
        file = path if path.suffix == ".onnx" else path / "model.onnx"
        logits = graph_logits(file, adapter_file)
        return lambda e, b: follow(e, _checked(logits(e.whole), e, file.name), b), str(path), False
    if adapter_file is not None:
        raise OftfxError(f"{text} is no .onnx file; --adapter-file is for one")
    made: Any = open_model(check_model(path))

    @torch.no_grad()
    def run(expected: Expected, base: Bare | None) -> Followed:
        found = made(input_ids=expected.whole, attention_mask=torch.ones_like(expected.whole), use_cache=False).logits
        return follow(expected, _checked(found, expected, path.name), base)

    return run, str(path), False


def _checked(logits: Tensor, expected: Expected, name: str) -> Tensor:
    if logits.shape[-1] != expected.logits.shape[-1]:
        raise OftfxError(
            f"{name} has a vocabulary of {logits.shape[-1]}, the base one of {expected.logits.shape[-1]}: it was made "
            "of another model"
        )
    return logits


def _word(tokenizer: Any, tokens: Sequence[int], row: Followed, place: int) -> str:
    """The token at which they part, as text; empty where they do not."""
    if row.is_equal or place >= len(tokens):
        return ""
    text = str(tokenizer.decode([tokens[place]]))
    return text or f"token {tokens[place]}"
