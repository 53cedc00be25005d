"""What an adapter costs, as the command says it."""

import json

import pytest

from oftfx.evaluation.speed import WORK, speeds
from tests.cli.command import run

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers")


def test_base_adapter_and_fold(files):
    assert run("fold", files.base, files.adapter, files.out, "--quiet").status == 0
    said = ["--prompt", "24", "--batch", "2", "--rounds", "2", "--json"]
    done = run("bench", files.base, "--adapter", files.adapter, "--also", files.out, *said)
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert [r["name"] for r in found["rows"]] == ["base", "adapter", "out"]
    for row in found["rows"]:
        assert row["why_not"] == {}
        assert all(row["seconds"][w] > 0 for w in WORK)
    assert set(found["rows"][0]["ratio"].values()) == {1.0}
    assert found["rows"][1]["nbytes"] > found["rows"][0]["nbytes"] == found["rows"][2]["nbytes"]
    table = run("bench", files.base, "--adapter", files.adapter, "--prompt", "8", "--rounds", "1", "--quiet")
    assert "training step" in table.out


def test_what_is_timed(tiny_llama):
    """Each kind of work reads the tokens that it says, and a step reaches the embedded tokens and every skew."""
    import oftfx

    model = tiny_llama().requires_grad_(False)
    adapted = oftfx.transform(model, {"all-linear": oftfx.OFT(16)})
    read, grown = [], []
    adapted.model.layers[0].register_forward_hook(lambda _m, args, _o: read.append(tuple(args[0].shape[:2])))
    for parameter in oftfx.adapter_parameters(adapted):
        parameter.register_hook(lambda g: grown.append(bool(g.isfinite().all())))
    speeds({"base": model, "adapted": adapted}, prompt=9, batch=3, rounds=1)
    assert set(read) == {(1, 9), (1, 1), (3, 9)}
    assert len(grown) == 3 * len(list(oftfx.adapter_parameters(adapted)))
    assert all(grown)
    assert all(p.grad is None for p in oftfx.adapter_parameters(adapted))
    assert not adapted.training


def test_what_a_model_cannot_do_is_said(tiny_llama, files, monkeypatch):
    from transformers import DynamicCache

    def crop(*_):
        raise NotImplementedError("of no use here")

    monkeypatch.setattr(DynamicCache, "crop", crop)
    found = speeds({"base": tiny_llama()}, prompt=4, batch=1, rounds=1)
    assert found.rows[0].why_not == {"token": "NotImplementedError: of no use here"}
    assert "no" in found.table()
    assert "of no use here" in run("bench", files.base, "--prompt", "4", "--rounds", "1").err
