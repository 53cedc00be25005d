"""The commands of the guide to servers, as printed but for the ports."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.serving import Repository
from tests.serving.servers import ROOT, Server, environment, free_ports

pytestmark = [
    pytest.mark.server,
    pytest.mark.needs("onnx", "onnxruntime", "onnxscript", "transformers", "typer", "rich"),
]

GUIDE = (ROOT / "tools/docs/pages/guides/servers.md").read_text()
(SHELL,) = re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL)
EXAMPLE = (ROOT / "tests/examples/serve_adapters.py").read_text()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The guide's three lines of Python, on a model with two adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **small)).eval()
    model = oftfx.transform(base, {"*_proj": OFT(8)}, adapter="a1")
    oftfx.add_adapter(model, "a2", {"*_proj": OFT(8)})
    for name in ("a1", "a2"):
        for parameter in oftfx.adapter_parameters(model, name):
            nn.init.normal_(parameter, std=0.1)
    oftfx.set_adapter(model, "a1")
    batch = {"input_ids": torch.randint(64, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    folder = tmp_path_factory.mktemp("guide")
    assert '--8<-- "tests/examples/serve_adapters.py:export"' in GUIDE
    _, code, _ = re.split(r"# --8<-- \[(?:start|end):export\]\n", EXAMPLE)
    assert code.count("\n") == 3
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(code, {"oftfx": oftfx, "model": model, "batch": batch})
    finally:
        os.chdir(before)
    return model, folder


@pytest.mark.parametrize(("kind", "ports"), [("triton", (8000, 8001)), ("mlserver", (8080, 8081))])
def test_commands(kind, ports, exported):
    environment(kind)
    model, folder = exported
    write, start, curl = (
        next(line for line in SHELL.splitlines() if line.startswith(words))
        for words in (
            f"oftfx repository tenants.onnx {kind} ",
            f".venv-{kind}/bin/",
            f"curl -s http://127.0.0.1:{ports[0]}/",
        )
    )
    http, grpc = free_ports()
    free = {str(ports[0]): str(http), str(ports[1]): str(grpc)}
    moved = re.compile("|".join(free))
    more = ["--http-port", str(http), "--grpc-port", str(grpc)]  # the guide's are the defaults
    command = [sys.executable, "-m", "oftfx.cli", *shlex.split(write)[1:], *more]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    start = moved.sub(lambda m: free[m.group()], start)
    # It is also the command that the writing printed, with the environment named.
    assert done.stdout.split("start: ")[1].strip() == start.removeprefix(f".venv-{kind}/bin/")
    (folder / f".venv-{kind}").symlink_to(ROOT / f".venv-{kind}")
    written = Repository(folder / kind, folder / kind / "tenants/1", ("a1", "a2"), "", start)
    _, _, url, *_, body = shlex.split(curl)
    asked = json.loads(body)
    ids = torch.tensor([asked["inputs"][0]["data"]])
    with Server(kind, written, http, grpc) as server:
        assert url.endswith("/v2/models/tenants/infer")
        answer = server.infer("tenants", {}, asked["parameters"], inputs=asked["inputs"])
    oftfx.set_adapter(model, asked["parameters"]["adapter"])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert answer.status == 200
    assert float((torch.from_numpy(answer.outputs["logits"]) - expected).abs().max()) < 2e-6
