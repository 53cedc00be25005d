"""The command ``oftfx generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oftfx.cli import show
from oftfx.cli.options import Base, Dtype, Json, Quiet, Threads, use_threads


def generate(
    base: Base,
    prompt: Annotated[str, typer.Argument(help="What the model goes on from.", show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="An adapter, unfolded.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn of the chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn, at a temperature above 0.")] = 0,
    dtype: Dtype = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Text that a model, folded or with an adapter, adds to a prompt; each word is there when it is made."""
    import torch
    from transformers import TextStreamer

    from oftfx.adapter.load import load_adapter
    from oftfx.opened import open_model, open_tokenizer

    use_threads(threads)
    tokenizer = open_tokenizer(base)
    with show.waiting("open the model", quiet=quiet or json):
        model: Any = open_model(base, dtype=dtype)
        if adapter is not None:
            model = load_adapter(model, adapter)
    given = _ids(tokenizer, prompt, chat=chat)
    if not given:
        raise show.OutputError("the prompt has no token; write something")
    torch.manual_seed(seed)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = None if json else TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    ids = torch.tensor([given], device=next(model.parameters()).device)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **drawn,
        )[0, len(given) :]
    if json:
        import json as as_json

        text = tokenizer.decode(made, skip_special_tokens=True)
        show.result(as_json.dumps({"prompt": prompt, "tokens": made.tolist(), "text": text}))


def _ids(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise show.OutputError("the tokenizer has no chat template; leave --chat away")
    turn = [{"role": "user", "content": prompt}]
    made = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(made, add_special_tokens=False)["input_ids"])
