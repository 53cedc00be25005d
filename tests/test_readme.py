"""The README's example runs as printed, and its table comes from the figures that are committed."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.needs("transformers", "onnx", "onnxruntime", "onnxscript")
def test_the_example_runs_as_printed(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "model.onnx").stat().st_size > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_tables_are_what_the_tools_write_from_the_committed_figures():
    tool = runpy.run_path(str(ROOT / "tools" / "update_readme.py"))
    assert tool["filled"](README) == README, "run tools/update_readme.py"
