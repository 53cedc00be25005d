"""A checkpoint, an ONNX file and a server are told from what they should be, and from the base."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.evaluation.tokens import greedy
from oftfx.opened import open_model
from tests.cli.command import run
from tests.reference import randomize

pytestmark = pytest.mark.needs("typer", "rich", "transformers", "tokenizers")
PROMPTS = ["--prompt", "w1 w5 w9", "--prompt", "w77", "--tokens", "9", "--quiet"]


@pytest.fixture
def spread(files):
    """Weights and an adapter by which best tokens are well ahead, and differ between base and adapter."""
    base = open_model(files.base)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    base.save_pretrained(files.base)
    for stale in files.base.glob("model-*"):
        stale.unlink()
    (files.base / "model.safetensors.index.json").unlink(missing_ok=True)
    for name, seed in (("adapter", 1), ("other", 2)):
        model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.2, seed=seed)
        oftfx.save_adapter(model, files.tmp / name)
    return files


def test_a_folded_checkpoint(spread):
    assert run("fold", spread.base, spread.adapter, spread.out, "--quiet").status == 0
    against = ["--base", spread.base, "--adapter"]
    done = run("verify", spread.out, *against, spread.adapter, *PROMPTS)
    assert done.status == 0, done.err
    assert f"equal: {spread.out} gives the 18 tokens of base with adapter, to 2 prompts" in done.out
    wrong = run("verify", spread.out, *against, spread.tmp / "other", *PROMPTS, "--json")
    assert wrong.status == 3
    found = json.loads(wrong.out)
    assert found["state"] == "different"
    first = next(p for p in found["prompts"] if p["found"])
    assert f"token {first['same'] + 1} is {first['found']!r}" in found["verdict"]
    lost = run("verify", spread.base, *against, spread.adapter, *PROMPTS)
    assert lost.status == 3
    assert "the adapter is not there" in lost.out
    itself = run("verify", spread.base, "--base", spread.base, *PROMPTS)
    assert itself.status == 0


def test_the_tokens_are_those_of_generate(spread):
    model = open_model(spread.base)
    found = greedy(model, [4, 5, 6], 12)
    theirs = model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert found.tokens == tuple(theirs[0, 3:].tolist())
    with torch.no_grad():
        logits = model(found.whole).logits[0, 2:]
    assert torch.allclose(logits, found.logits, atol=1e-4)


@pytest.mark.needs("onnx", "onnxruntime", "onnxscript")
@pytest.mark.slow
def test_onnx_files_with_and_without_a_cache(spread):
    graph = spread.tmp / "m.onnx"
    for more in ([], ["--cache"], ["--cache", "--fused"]):
        done = run("export", spread.base, graph, "--adapter", spread.adapter, *more, "--force")
        assert done.status == 0, done.err
        done = run("verify", graph, "--base", spread.base, "--adapter", spread.adapter, *PROMPTS)
        assert done.status == 0, done.out
    assert run("verify", graph, "--base", spread.base, "--adapter", spread.tmp / "other", *PROMPTS).status == 3
    swappable, file = spread.tmp / "s.onnx", spread.tmp / "a.onnx_adapter"
    assert run("export", spread.base, swappable, "--adapter", spread.adapter, "--mode", "swappable").status == 0
    assert run("export-adapter", spread.base, spread.tmp / "other", file, "--graph", swappable).status == 0
    against = ["--base", spread.base, *PROMPTS]
    assert run("verify", swappable, *against).status == 0
    assert run("verify", swappable, *against, "--adapter", spread.tmp / "other", "--adapter-file", file).status == 0
    lost = run("verify", swappable, *against, "--adapter", spread.tmp / "other")
    assert (lost.status, "the adapter is not there" in lost.out) == (3, True)
    inspected = json.loads(run("inspect", swappable, "--json").out)
    assert inspected["adapter mode"] == "swappable"
    assert "interface" in run("inspect", file).out


@contextmanager
def server(answer):
    """An HTTP server of which ``answer(path, body)`` is the JSON, or None for 404."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body):
            found = answer(self.path, body)
            data = json.dumps(found if found is not None else {"error": "not here"}).encode()
            self.send_response(200 if found is not None else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply(None)

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}"
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def test_a_server_of_the_openai_api(spread):
    """By a model here that answers as the protocol has it; the real servers are in tests/serving."""
    model = oftfx.load_adapter(open_model(spread.base), spread.adapter)

    def answer(path, body):
        if path == "/v1/models":
            return {"data": [{"id": "base", "parent": None}, {"id": "news", "parent": "base"}]}
        if path != "/v1/completions" or body["model"] not in ("base", "news"):
            return None
        names = "default" if body["model"] == "news" else None
        oftfx.set_adapter(model, names)
        return {"choices": [{"token_ids": list(greedy(model, body["prompt"], body["max_tokens"]).tokens)}]}

    against = ["--base", spread.base, "--adapter", spread.adapter, *PROMPTS]
    with server(answer) as url:
        assert run("verify", url, *against, "--served-adapter", "news").status == 0
        lost = run("verify", url, *against)
        assert (lost.status, "the adapter is not there" in lost.out) == (3, True)
        unknown = run("verify", url, *against, "--served-adapter", "nws")
        assert unknown.status == 1
        assert "404" in unknown.err


def test_what_is_no_server(spread):
    against = ["--base", spread.base, *PROMPTS]
    assert "no answer" in run("verify", "http://127.0.0.1:9", *against).err
    with server(lambda *_: None) as url:
        assert "speaks neither the OpenAI API nor the Open Inference Protocol" in run("verify", url, *against).err
    assert "is no server" in run("verify", spread.base, *against, "--served-adapter", "x").err
    assert "there is no file" in run("verify", spread.tmp / "no.onnx", *against).err
