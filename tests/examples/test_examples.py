"""Every example runs as it stands, its own assertions included. The guides show these files."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEEDS = {
    "convolution": ("onnx", "onnxruntime", "onnxscript"),
    "fold_aware": ("bitsandbytes",),
    "from_peft": ("transformers", "peft"),
    "genai": ("transformers", "tokenizers", "onnx", "onnxruntime", "onnxscript", "onnxruntime_genai"),
    "gguf_for_llama_cpp": ("transformers", "gguf"),
    "language_model_4bit": ("transformers", "accelerate", "bitsandbytes", "onnx", "onnxruntime", "onnxscript"),
    "many_adapters": ("transformers",),
    "other_tools": ("lycoris",),
    "onnx_swappable": ("transformers", "onnx", "onnxruntime", "onnxscript"),
    "quantize_for_vllm": ("transformers", "accelerate", "bitsandbytes", "compressed_tensors"),
    "reports": ("transformers", "accelerate", "bitsandbytes", "jinja2", "itables", "vl_convert", "PIL"),
    "rules": ("transformers",),
    "save_folded": ("transformers", "accelerate", "bitsandbytes"),
    "serve_adapters": ("transformers", "onnx", "onnxruntime", "onnxscript"),
    "strength": ("transformers",),
    "trainer": ("transformers", "accelerate"),
    "write_a_format": (),
    "write_a_pass": (),
}
"""What each file imports besides torch."""
ELSEWHERE = "first_example"
"""Run by tests/test_readme.py, as the README prints it."""
APART = {"write_a_format"}
"""Run in a process of their own: what they register would be there for every test that follows."""


def mark(name):
    return pytest.param(name, marks=pytest.mark.needs(*NEEDS[name]))


def test_every_example_is_listed():
    assert {p.stem for p in HERE.glob("*.py")} - {"__init__", Path(__file__).stem} == {*NEEDS, ELSEWHERE}


@pytest.fixture(autouse=True)
def _accelerate_state():
    """Accelerate keeps what a Trainer chose in singletons; the tests after these start without."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@pytest.mark.filterwarnings("ignore:.*kernels.*")
@pytest.mark.parametrize("name", [mark(n) for n in NEEDS])
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in APART:
        subprocess.run([sys.executable, "-W", "error::UserWarning", str(HERE / f"{name}.py")], check=True)
        return
    runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
