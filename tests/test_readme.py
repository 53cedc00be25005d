"""The README's example runs as printed, and its table comes from the figures that are committed."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.needs("transformers", "onnx", "onnxruntime", "onnxscript")
def test_the_example_runs_as_printed(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "model.onnx").stat().st_size > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_table_is_the_tools_own():
    import json

    from oftfx.demo.job import COLUMNS, table_rows

    figures = json.loads((Path(__file__).parents[1] / "tools" / "results" / "quickstart.json").read_text())
    lines = ["| " + " | ".join(COLUMNS) + " |", *("| " + " | ".join(r) + " |" for r in table_rows(figures))]
    for line in lines:
        assert line in README, line
