"""The README's example runs as printed, and is the one that the guides show."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "tests/examples/first_example.py"


@pytest.mark.needs("transformers", "onnx", "onnxruntime", "onnxscript")
def test_the_example_runs_as_printed(tmp_path, monkeypatch):
    (printed,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(printed.strip().splitlines()) <= 20
    before, shown, after = re.split(r"# --8<-- \[(?:start|end):readme\]\n", EXAMPLE.read_text())
    assert shown == printed
    monkeypatch.chdir(tmp_path)
    # As printed, and then what the file asserts of it.
    exec(compile(before + printed + after, "README.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "model.onnx").stat().st_size > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_it_is_short():
    assert len(README.splitlines()) <= 130


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []
