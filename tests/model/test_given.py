"""What looks like a model, and is none: everywhere the same answer, with what to do."""

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, FoldError

X = torch.randn(5, 6)


def result():
    model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": OFT(3, init="normal")})
    return oftfx.fold(model)


CALLS = {
    "plan": lambda m: oftfx.plan(m, {"*": OFT(3)}),
    "transform": lambda m: oftfx.transform(m, {"*": OFT(3)}),
    "fold": oftfx.fold,
    "save_adapter": lambda m: oftfx.save_adapter(m, "x"),
    "load_adapter": lambda m: oftfx.load_adapter(m, "x"),
    "export_onnx": lambda m: oftfx.export_onnx(m, "x.onnx", (X,)),
    "adapters": oftfx.adapters,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_result_and_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "export_onnx":
        pytest.importorskip("onnxscript")
    with pytest.raises(AdapterError, match="the result of a fold; the folded model is its .model"):
        CALLS[name](result())
    with pytest.raises(AdapterError, match="got 'tiny', expected a model; load it first"):
        CALLS[name]("tiny")
    with pytest.raises(AdapterError, match="got a Tensor, expected a torch.nn.Module"):
        CALLS[name](X)
    assert not list(tmp_path.iterdir())


@pytest.mark.needs("peft", "transformers")
@pytest.mark.parametrize("name", ["plan", "transform", "fold", "save_adapter", "load_adapter"])
def test_a_model_of_peft(name, tiny_llama, tmp_path, monkeypatch):
    import peft

    monkeypatch.chdir(tmp_path)
    model = peft.get_peft_model(tiny_llama(), peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8))
    with pytest.raises(AdapterError, match=r"peft_model.unload\(\) returns.*oftfx.load_adapter\(base"):
        CALLS[name](model)


def test_folding_and_unfolding_twice():
    done = result()
    with pytest.raises(AdapterError, match="default was folded into it already. oftfx.unfold"):
        oftfx.fold(done.model)
    with pytest.raises(FoldError, match="unfold: got a Sequential, expected what oftfx.fold returned"):
        oftfx.unfold(done.model)


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        base = torch.nn.Sequential(torch.nn.Linear(6, 4))
    with pytest.raises(FoldError, match="0 is on the meta device and has no numbers"):
        oftfx.fold(oftfx.transform(base, {"*": OFT(3)}))


def test_an_input_that_the_model_does_not_take():
    model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": OFT(3, init="normal")})
    with pytest.raises(FoldError, match=r"the model cannot be run on \(inputs float32 \(5, 6\)\): TypeError"):
        oftfx.fold(model, calibration=[{"inputs": X}])


def test_a_policy_with_nothing_to_do_is_said():
    model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": OFT(3, init="normal")})
    with pytest.warns(oftfx.errors.OftfxWarning, match="quantized='calibrate' has nothing to do"):
        oftfx.fold(model, quantized="calibrate", calibration=[(X,)])
