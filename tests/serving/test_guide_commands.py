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

import oftfx
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
    """The guide's three lines of Python, on the example's model with two adapters."""
    assert '--8<-- "tests/examples/serve_adapters.py:export"' in GUIDE
    model_of_two, export, _ = re.split(r"# --8<-- \[(?:start|end):export\]\n", EXAMPLE)
    assert export.count("\n") == 3
    folder = tmp_path_factory.mktemp("guide")
    names: dict = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(model_of_two + export, names)
    finally:
        os.chdir(before)
    return names["model"], folder


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
    command = [sys.executable, "-m", "oftfx", *shlex.split(write)[1:], *more]
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
