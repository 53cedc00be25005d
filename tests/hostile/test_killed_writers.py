import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.needs("onnx", "onnxruntime", "onnxscript")
@pytest.mark.slow
def test_what_was_there_loads_whenever_its_writer_is_killed(tmp_path):
    script = Path(__file__).with_name("killed_writers.py")
    command = [sys.executable, "-W", "ignore", "-m", "tests.hostile.killed_writers", "40", "7", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=script.parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert sum(found["found"].values()) == 5 * 40
    # Both versions were met, so kills fell between and into writes.
    assert {"adapter: 0", "adapter: 1", "fold: 0", "fold: 1", "train: 0", "train: 1"} <= set(found["found"])
