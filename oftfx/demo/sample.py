"""A small real model and real texts as files, for a first try of the command line."""

from __future__ import annotations

import json
from pathlib import Path

from oftfx.demo import smollm, text
from oftfx.errors import OftfxError
from oftfx.files import landing, write


def write_sample(out: Path) -> None:
    """Write ``base/`` (SmolLM2-135M-Instruct, float32), ``train.jsonl`` and ``held_out.jsonl`` (news articles).

    Raises:
        OftfxError: a data package is missing, or the directory cannot be written to.
    """
    model, tokenizer = smollm.load()
    with landing(out, "base", OftfxError) as made:
        model.save_pretrained(made / "base")  # type: ignore[operator]
        tokenizer.save_pretrained(made / "base")
        for name, split in (("train.jsonl", "train"), ("held_out.jsonl", "test")):
            lines = [json.dumps({"text": article}) for article in text.read(split)]  # type: ignore[arg-type]
            write(made / name, ("\n".join(lines) + "\n").encode())
