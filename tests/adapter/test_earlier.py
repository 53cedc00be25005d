"""What oftfx 0.1.0 wrote is read: an adapter and a fold, against the outputs that it computed then."""

import json
from pathlib import Path

import torch.nn as nn
from safetensors.torch import load_file

import oftfx
from tests.reference import rel

FILES = Path(__file__).parent / "files/oftfx-0.1.0"
WRITTEN = load_file(FILES / "outputs.safetensors")


def net():
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6)).eval()


def base():
    found = net()
    found.load_state_dict(load_file(FILES / "base.safetensors"))
    return found


def test_an_adapter():
    model = oftfx.load_adapter(base(), FILES / "adapter").eval()
    assert rel(model(WRITTEN["inputs"]), WRITTEN["outputs"]) < 1e-6
    assert rel(base()(WRITTEN["inputs"]), WRITTEN["outputs"]) > 1e-2


def test_a_fold():
    assert json.loads((FILES / "folded/oftfx_fold.json").read_text())["oftfx"] == "0.1.0"
    model = oftfx.load_folded(FILES / "folded", net())
    assert rel(model(WRITTEN["inputs"]), WRITTEN["outputs"]) < 1e-6
