import json
import math

import pytest
import torch
import torch.nn.functional as F

import oftfx
from oftfx.opened import open_model, open_tokenizer
from oftfx.streaming.texts import blocks, read_texts
from tests.cli.command import run

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers")


def test_base_adapter_and_fold_side_by_side(files):
    assert run("fold", files.base, files.adapter, files.out, "--quiet").status == 0
    said = ["--text", files.texts, "--sequence", "32", "--tokens", "640"]
    done = run("eval", files.base, *said, "--adapter", files.adapter, "--also", files.out, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    base, adapter, folded = found["rows"]
    ids = blocks(open_tokenizer(files.base), read_texts(files.texts, None), 32)[:20]
    model = oftfx.load_adapter(open_model(files.base), files.adapter)
    with torch.no_grad():
        scores = {n: m(ids).logits[:, :-1].double() for n, m in (("b", open_model(files.base)), ("a", model))}
    wanted = {n: float(F.cross_entropy(s.flatten(0, 1), ids[:, 1:].flatten())) for n, s in scores.items()}
    assert math.log(base["perplexity"]) == pytest.approx(wanted["b"], rel=1e-5)
    assert math.log(adapter["perplexity"]) == pytest.approx(wanted["a"], rel=1e-5)
    assert folded["perplexity"] == pytest.approx(adapter["perplexity"], rel=1e-4)
    assert (adapter["agreement"], adapter["divergence"], base["time"]) == (1.0, 0.0, 1.0)
    same = (scores["b"].argmax(-1) == scores["a"].argmax(-1)).double().mean()
    assert base["agreement"] == pytest.approx(float(same))
    a, b = F.log_softmax(scores["a"], -1), F.log_softmax(scores["b"], -1)
    assert base["divergence"] == pytest.approx(float((a.exp() * (a - b)).sum(-1).mean()), rel=1e-3)
    plain = open_model(files.base)
    assert base["nbytes"] == 4 * sum(t.numel() for t in (*plain.parameters(), *plain.buffers()))
    table = run("eval", files.base, *said, "--rounds", "0", "--quiet")
    assert "620 held-out tokens, held against base" in table.out
