"""What training reads: its recipe, how far it was, and examples."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from oftfx.inspecting.inspect import inspect
from oftfx.streaming.texts import blocks, read_texts
from oftfx.training.progress import losses_so_far, resume, save_progress
from oftfx.training.read_examples import read_examples
from oftfx.training.recipe import Recipe
from tests.cli.conftest import make_tokenizer
from tests.fuzz.bundle import joined, parted, place
from tests.fuzz.targets.base import Target, every

NAMES = ("oftfx_train.toml", "training.safetensors", "oftfx_training.json")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
RECIPE = b"""base = "a"
data = "b"
rate = 0.1
warmup = 0.1
steps = 5
epochs = 1.5
sequence = 8
seed = 1
dtype = "float32"
target = "q_proj"
share_input = true
"""
DATA = {
    "text.jsonl": b'{"text": "w0 w1 w2 w3 w4 w5 w6 w7 w8"}\n{"text": "w1 w2 w3 w4 w5"}',
    "chat.jsonl": b'{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]}',
    "pairs.jsonl": b'{"prompt": "w1 w2", "completion": "w3 w4"}',
    "plain.txt": b"w0 w1 w2 w3 w4 w5\n\nw6 w7 w8",
}


def _parameters() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    made = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    return made, torch.optim.AdamW(made)


def runs(path: Path) -> list[bytes]:
    """A stopped one and a complete one."""
    parameters, optimizer = _parameters()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_progress(path, parameters, optimizer, [3.0, 2.5])
    recipe = RECIPE
    made = {"oftfx_train.toml": recipe, "training.safetensors": (path / "training.safetensors").read_bytes()}
    result = {"losses": [1.0], "held_out": {"before": {"loss": 1.0}, "after": {"loss": 0.5}}}
    return [joined(made), joined(made | {"oftfx_training.json": json.dumps(result).encode()})]


def read_run(data: bytes, path: Path) -> None:
    """As one that goes on, and as one that is looked at."""
    place(data, path, NAMES)
    parameters, optimizer = _parameters()
    state = torch.get_rng_state()

    def going_on() -> None:
        resume(path, parameters, optimizer)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    try:
        every(
            lambda: Recipe.read(path / NAMES[0], steps=3),
            lambda: losses_so_far(path),
            going_on,
            lambda: str(inspect(path)).encode(),
            lambda: inspect(path).to_json(),
        )
    finally:
        torch.set_rng_state(state)


@cache
def _tokenizer() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return make_tokenizer(folder, TEMPLATE)


def examples(path: Path) -> list[bytes]:
    """Of each kind."""
    _tokenizer()
    return [joined({name: data}) for name, data in DATA.items()]


def read_data(data: bytes, path: Path) -> None:
    """As examples, and as calibration texts."""
    found = parted(data)
    place(data, path, tuple(DATA))
    tokenizer = _tokenizer()
    for file in sorted(path.iterdir()):
        every(
            lambda file=file: read_examples(file, tokenizer, 4).batch(1, 2),  # type: ignore[misc]
            lambda file=file: blocks(tokenizer, read_texts(file, tokenizer), 4),  # type: ignore[misc]
        )
    del found


RUNS = Target(
    "runs",
    runs,
    read_run,
    (
        *Recipe.__dataclass_fields__,
        "held_out",
        "before",
        "after",
        "loss",
        "losses",
        "random",
        "parameter.0",
        "exp_avg.0",
        "exp_avg_sq.1",
        "step.0",
        "step.1",
    ),
)
EXAMPLES = Target(
    "examples",
    examples,
    read_data,
    (
        "text",
        "messages",
        "prompt",
        "completion",
        "role",
        "content",
        "assistant",
        "user",
        "system",
        "tool_calls",
        "<s>",
        "</s>",
    ),
    ("transformers", "tokenizers"),
)
