"""The command: an adapter made here is looked at and compared, and what needs another extra says so."""

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch.nn as nn

import oftfx
from oftfx import OFT


def run(*words, status=0):
    done = subprocess.run(["oftfx", *words], capture_output=True, text=True, check=False)
    assert done.returncode == status, done
    return done.stdout if status == 0 else done.stderr


model = oftfx.transform(nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8)), {"*": OFT(8, init="normal")})
oftfx.save_adapter(model, "adapter")
assert run("--version").split() == ["oftfx", oftfx.__version__]
assert "fold" in run("--help")
found = json.loads(run("inspect", "adapter", "--json"))
assert (found["kind"], found["rotations"]) == ("adapter", 2), found
assert "adapter" in run("inspect", "adapter")
Path("model").mkdir()
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
Path("model/config.json").write_text(
    json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 99, **sizes})
)
if find_spec("transformers") is None:
    assert "pip install 'oftfx[hf]'" in run("plan", "model", status=1)
else:
    assert json.loads(run("plan", "model", "--block-size", "16", "--json"))
