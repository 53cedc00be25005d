"""Shared fixtures: tiny real architectures, an independent dense reference, and the skip rule for optional packages."""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings

import pytest
import torch

from tests.exporter import read_operators_once

# bitsandbytes and transformers must never look for a network, and GenAI must not report to its maker.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
read_operators_once()
gc.set_threshold(20_000, 20, 50)  # a process of tests holds millions of objects, and looks through them often: a tenth


LAYERS = {"aqlm", "auto_gptq", "awq", "compressed_tensors", "gptqmodel", "hqq", "neural_compressor", "openvino"}
LAYERS |= {"openvino_genai", "openvino_tokenizers"}
LAYERS |= {"optimum.quanto", "torchao"}
"""Packages of tools/environment-layers: they conflict with each other's requirements, so they are kept apart."""


SLOW = (
    "tests/onnx/decoders/",
    "tests/onnx/fused/",
    "tests/onnx/test_accuracy.py",
    "tests/onnx/test_adapters.py",
    "tests/onnx/test_decoder.py",
    "tests/onnx/test_export.py",
    "tests/onnx/test_inputs",
    "tests/onnx/test_lowered_formats.py",
    "tests/onnx/test_lowering.py",
    "tests/onnx/test_verify.py",
    "tests/zoo/",
    "tests/examples/",
    "tests/demo/test_ocr.py",
    "tests/demo/test_stages.py",
    "tests/trace/test_record.py",
    "tests/ecosystem/test_compile.py",
    "tests/ecosystem/test_compiled_eval.py",
    "tests/test_gpu_bench.py::test_all",
    "tests/ecosystem/test_distributed.py",
    "tests/test_packaging.py",
    "tests/placement/test_group.py::test_compiled",
    "tests/test_surgery.py::test_compiled",
    "tests/cli/test_main.py",
    "tests/cli/test_full_disk.py::test_a_graph",
    "tests/cli/test_full_disk.py::test_a_directory_for",
    "tests/folding/test_memory.py",
    "tests/trace/test_threads.py",
    "tests/test_public_names.py",
    "tests/test_docs.py",
    "tests/adapter/test_belonging.py::test_a_process_killed",
    "tests/adapter/test_folded.py::test_a_process_killed",
)
"""Beginnings of the names of tests that took three quarters of the time in one run with ``--durations``."""


FIRST = ("tests/trace/", "tests/folding/test_lockstep_memory.py", "tests/folding/test_memory.py")
"""What looks through all objects of its process, which after other tests are ten times as many."""


def _place(item):
    """What is slow comes before the rest, so that no process ends with it alone."""
    return 0 if item.nodeid.startswith(FIRST) else 1 if item.nodeid.startswith(SLOW) else 2


def pytest_collection_modifyitems(config, items):
    """Skip tests whose packages are missing. In CI, with OFTFX_REQUIRE_ALL, let them fail instead.

    OFTFX_REQUIRE_ALL=1 requires what .venv has, all but `LAYERS`. OFTFX_REQUIRE_ALL=layers is for .venv-layers: only
    the tests that need one of those packages are run, and none is skipped.
    """
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=_place)
    required = os.environ.get("OFTFX_REQUIRE_ALL")
    if required == "layers":
        chosen = [i for i in items if LAYERS & {a for m in i.iter_markers("needs") for a in m.args}]
        config.hook.pytest_deselected(items=[i for i in items if i not in set(chosen)])
        items[:] = chosen
        return
    for item in items:
        for mark in item.iter_markers("needs"):
            missing = [m for m in mark.args if not _is_there(m) and (not required or m in LAYERS)]
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))


def _is_there(package):
    """Whether a package, or one inside another, is installed; importing neither."""
    above, _, _ = package.rpartition(".")
    return (not above or _is_there(above)) and importlib.util.find_spec(package) is not None


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**changes):
        config = {
            "vocab_size": 131,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "max_position_embeddings": 128,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            **changes,
        }
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**config)).eval()

    return make


@pytest.fixture
def tiny_bert():
    from transformers import BertConfig, BertForSequenceClassification

    def make(**changes):
        config = {
            "vocab_size": 131,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 80,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **changes,
        }
        torch.manual_seed(1)
        return BertForSequenceClassification(BertConfig(**config)).eval()

    return make


@pytest.fixture
def ids():
    """Token ids and mask of a batch."""

    def make(batch=2, length=11, vocabulary=131, seed=0):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(5, vocabulary, (batch, length), generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    return make


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M in float32 and its tokenizer; read only."""
    from oftfx.demo import smollm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return smollm.load()
