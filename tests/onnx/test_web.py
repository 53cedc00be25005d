"""ONNX Runtime Web, in node: one graph with adapters as inputs, against torch."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import oftfx
from oftfx import OFT
from tests.gguf.test_llama_cpp import COUNT, PROMPTS, TIE, made
from tests.reference import rel
from tests.serving.node import node
from tests.serving.vllm_server import greedy, same

pytestmark = [pytest.mark.server, pytest.mark.needs("onnx", "onnxruntime", "onnxscript", "transformers")]


@pytest.fixture
def tenants():
    """A decoder with two adapters."""
    model = oftfx.transform(made("biases"), {"all-linear": OFT(16, share_input=True)}, adapter="a")
    oftfx.add_adapter(model, "b", {"all-linear": OFT(16, share_input=True)})
    for index, parameter in enumerate(p for name in "ab" for p in oftfx.adapter_parameters(model, name)):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(index))
    return model


def test_adapters_as_inputs_in_the_browsers_runtime(tenants, tmp_path):
    """Two adapters and the base in one session: logits, and 32 tokens of four prompts."""
    report = oftfx.export_onnx(tenants, tmp_path / "m.onnx", cache=True, adapters="inputs", dialect="standard")
    files = {n: oftfx.export_onnx_adapter(tenants, tmp_path / f"{n}.safetensors", adapter=n) for n in "ab"}
    blocks = load_file(files["a"])
    eye = {n: torch.eye(b.shape[-1]).expand_as(b).contiguous() for n, b in blocks.items()}
    save_file(eye, tmp_path / "base.safetensors")
    files["base"] = tmp_path / "base.safetensors"
    got = node("onnx_web.mjs", tmp_path, graph=str(report.path), adapters={n: str(f) for n, f in files.items()},
               prompts=PROMPTS, count=COUNT, heads=2, head=48)  # fmt: skip
    assert set(got["inputs"]) == set(report.inputs)
    for name in files:
        oftfx.set_adapter(tenants, [] if name == "base" else name)
        expected = [greedy(tenants, p, COUNT) for p in PROMPTS]
        assert all(same(t, e, TIE) for t, e in zip(got["answers"][name], expected, strict=True)), name
        with torch.no_grad():
            logits = tenants(torch.tensor([PROMPTS[0]])).logits[0, -1]
        assert rel(torch.tensor(got["logits"][name]), logits) < 5e-6, name
    assert len({str(a) for a in got["answers"].values()}) == 3
    # What swappable graphs have by default cannot be given there: its interface has no inputs with defaults.
    oftfx.set_adapter(tenants, "a")
    swappable = oftfx.export_onnx(
        tenants, tmp_path / "s.onnx", cache=True, adapters="swappable", dialect="standard", verify=False
    )
    with pytest.raises(AssertionError, match=r"invalid input.*oft\.blocks"):
        node("onnx_web.mjs", tmp_path, graph=str(swappable.path), adapters={"a": str(files["a"])}, prompts=PROMPTS[:1],
             count=1, heads=2, head=48)  # fmt: skip
    plain = node("onnx_web.mjs", tmp_path, graph=str(swappable.path), adapters={"base": ""}, prompts=PROMPTS[:1],
                 count=COUNT, heads=2, head=48)  # fmt: skip
    assert plain["answers"]["base"] == got["answers"]["base"][:1]
