"""The memory of a fold of files is a multiple of its largest layer, not of the model."""

import json
import subprocess
import sys

import pytest

from oftfx import OFT
from tests.streaming.compare import adapter_for

pytestmark = [pytest.mark.needs("transformers"), pytest.mark.slow]
MEASURE = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers, oftfx
torch.set_num_threads(1)
def memory(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
oftfx.fold_checkpoint(*sys.argv[1:4])  # a small one: all that is imported, and the allocator's own
small = memory("VmHWM")
oftfx.fold_checkpoint(*sys.argv[4:7])
print(json.dumps(memory("VmHWM") - small))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own account")
@pytest.mark.parametrize("layers", [6, 18])
def test_the_peak_does_not_grow_with_the_model(tiny_llama, tmp_path, layers):
    paths = []
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": layers, "vocab_size": 4000}
    for name, changes in (("small", {}), ("large", sizes)):
        base = tiny_llama(**changes)
        base.save_pretrained(tmp_path / f"{name}", max_shard_size="50MB")
        adapter = adapter_for(base, tmp_path / f"{name}-adapter", {"all-linear": OFT(16)})
        paths += [str(tmp_path / name), str(adapter), str(tmp_path / f"{name}-out")]
        del base
    command = [sys.executable, "-c", MEASURE, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    largest = 768 * 2048 * 4
    whole = sum(p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors"))
    skews = (tmp_path / "large-adapter" / "adapter_model.safetensors").stat().st_size
    assert largest * 8 * layers / 2 > whole / 2  # so the bound below is far from the model's own size
    # Two layers under way and four that wait to be written, each twice; the adapter is read twice; pieces of copies.
    assert json.loads(done.stdout) < 8 * largest + 3 * skews + 24 * 2**20, (whole, skews)
