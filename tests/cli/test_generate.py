"""Tokens that the command gives, against a loop of forwards."""

import json

import pytest
import torch

import oftfx
from oftfx.evaluation.tokens import greedy
from oftfx.opened import open_model, open_tokenizer
from tests.cli.command import run

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers")
PROMPT = "w3 w10 w17"


def test_the_likeliest_tokens(files):
    ids = open_tokenizer(files.base)(PROMPT)["input_ids"]
    base, adapted = (open_model(files.base) for _ in range(2))
    oftfx.load_adapter(adapted, files.adapter)
    for model, more in ((base, []), (adapted, ["--adapter", files.adapter])):
        done = run("generate", files.base, PROMPT, "--tokens", "12", "--json", *more)
        assert done.status == 0, done.err
        found = json.loads(done.out)
        wanted = list(greedy(model, ids, 12).tokens)
        if 2 in wanted:  # the end of a text
            wanted = wanted[: wanted.index(2) + 1]
        assert found["tokens"] == wanted
    text = run("generate", files.base, PROMPT, "--tokens", "12", "--quiet")
    assert text.out.startswith(PROMPT)


def test_drawn_by_a_seed(files):
    def tokens(seed):
        said = ["--tokens", "12", "--temperature", "1.5", "--seed", str(seed), "--json"]
        return json.loads(run("generate", files.base, PROMPT, *said).out)["tokens"]

    torch.manual_seed(9)
    first = tokens(1)
    assert tokens(1) == first
    assert tokens(2) != first


@pytest.mark.parametrize(("more", "message"), [(["--chat"], "no chat template"), ([], "no token")])
def test_what_cannot_be(files, more, message):
    done = run("generate", files.base, PROMPT if more else "", *more)
    assert done.status == 1
    assert message in done.err
