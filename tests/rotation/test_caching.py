"""Steps of optimisers are counted from the first rotation on, wherever it comes from."""

import subprocess
import sys

import pytest
import torch

import oftfx
from oftfx import OFT

MADE = """
make = lambda: oftfx.transform(torch.nn.Sequential(torch.nn.Linear(4, 4)), {"*": OFT(2)})
threads = [threading.Thread(target=make) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
LOADED = """
torch.load(sys.argv[1], weights_only=False)
"""
PROGRAM = """
import sys, threading
import torch, oftfx
from torch.optim import optimizer
from oftfx import *
import oftfx.rotation.caching, oftfx.rotation.module
hooks = optimizer._global_optimizer_post_hooks
assert not hooks, hooks
{first}
assert len(hooks) == 1, hooks
weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
torch.optim.SGD([weight]).step()
assert oftfx.rotation.caching.steps() == 1
"""


@pytest.mark.parametrize("first", [MADE, LOADED], ids=["made", "loaded"])
def test_optimizers_get_one_hook_with_the_first_rotation(tmp_path, first):
    model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(4, 4)), {"*": OFT(2)})
    torch.save(model, tmp_path / "model")
    subprocess.run([sys.executable, "-c", PROGRAM.format(first=first), str(tmp_path / "model")], check=True)
