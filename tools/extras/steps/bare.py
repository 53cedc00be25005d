"""The core alone: transform, train, save, load, fold and unfold, with no optional package there."""

import subprocess
import sys
from importlib.util import find_spec

import torch
import torch.nn as nn

import oftfx
from oftfx import OFT

assert "site-packages" in oftfx.__file__, oftfx.__file__
for absent in ("transformers", "bitsandbytes", "onnx", "typer", "rich"):
    assert find_spec(absent) is None, f"{absent} is here, so this says nothing of the core alone"

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
print(oftfx.plan(base, {"*": OFT(8)}))
model = oftfx.transform(base, {"*": OFT(8)})
x = torch.randn(16, 24)
assert torch.equal(model(x), base(x))
before = nn.functional.mse_loss(model(x), torch.zeros(16, 8))
optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=1e-2)
for _ in range(20):
    loss = nn.functional.mse_loss(model(x), torch.zeros(16, 8))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert loss < 0.9 * before, (loss, before)
model.eval()
oftfx.save_adapter(model, "adapter")
with torch.no_grad():
    plain = base(x)
loaded = oftfx.load_adapter(base, "adapter").eval()
result = oftfx.fold(model)
print(result.report)
restored = oftfx.unfold(result)
with torch.no_grad():
    unfolded = model(x)
    assert torch.equal(loaded(x), unfolded)
    assert (result.model(x) - unfolded).norm() < 1e-5 * unfolded.norm()
    assert (unfolded - plain).norm() > 1e-2 * unfolded.norm()
    assert (restored(x) - unfolded).norm() < 1e-5 * unfolded.norm()

told = subprocess.run([sys.executable, "-P", "-m", "oftfx"], capture_output=True, text=True, check=False)
assert (told.returncode, "pip install 'oftfx[cli]'" in told.stderr) == (1, True), told
