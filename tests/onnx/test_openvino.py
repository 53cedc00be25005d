"""Directories for OpenVINO GenAI: torch's tokens from its pipeline, and from its runtime with adapters as inputs."""

import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import oftfx
from oftfx import OFT
from oftfx.errors import ExportError
from oftfx.onnx.openvino import EXACT
from tests.gguf.test_llama_cpp import COUNT, PROMPTS, TIE, made
from tests.gguf.tokenizers import AWKWARD, bytes_as_letters
from tests.reference import randomize
from tests.serving.vllm_server import greedy, same

pytestmark = [
    pytest.mark.server,
    pytest.mark.needs("openvino", "openvino_genai", "openvino_tokenizers", "onnxscript", "onnxruntime", "transformers"),
]


def tokens_of(directory, count=COUNT, **settings):
    """Of every prompt, from GenAI's pipeline."""
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(directory), "CPU", **settings)
    given = [openvino.Tensor(np.array([p], np.int64)) for p in PROMPTS]
    options = {"max_new_tokens": count, "ignore_eos": True, "do_sample": False}
    return pipeline, [list(pipeline.generate(ids, **options).tokens[0]) for ids in given]


def test_the_pipeline_gives_torchs_tokens(tmp_path):
    """Folded, and with the adapter in the graph; the tokenizer cuts texts as it did."""
    model = randomize(oftfx.transform(made("biases"), {"all-linear": OFT(16)}), std=0.05)
    folded, tokenizer = oftfx.fold(model).model, bytes_as_letters(340)
    expected = [greedy(folded, p, COUNT) for p in PROMPTS]
    for name, one in (("folded", folded), ("fixed", model)):
        report = oftfx.export_openvino(one, tmp_path / name, tokenizer=tokenizer)
        assert [c.case for c in report.checks][-2:] == ["in OpenVINO"] * 2
        pipeline, got = tokens_of(tmp_path / name, **EXACT)
        assert all(len(tokens) == COUNT and same(tokens, e, TIE) for tokens, e in zip(got, expected, strict=True))
    assert len({t for tokens in got for t in tokens}) > 20
    for text in filter(None, AWKWARD):
        cut = pipeline.get_tokenizer().encode(text).input_ids.data
        assert cut.flatten().tolist() == tokenizer(text)["input_ids"], text
    assert "openvino_tokenizer.xml" in {f.name for f in tmp_path.joinpath("folded").iterdir()}
    assert not [f for f in tmp_path.joinpath("folded").iterdir() if f.is_dir() or f.suffix == ".onnx"]


def test_adapters_as_inputs_of_the_runtime(tmp_path):
    """One compiled graph, two adapters and the base in turn. The pipeline does not find it: it feeds no such inputs."""
    import openvino
    import openvino_genai

    model = oftfx.transform(made("qwen2"), {"all-linear": OFT(16, share_input=True)}, adapter="a")
    oftfx.add_adapter(model, "b", {"all-linear": OFT(16, share_input=True)})
    for index, parameter in enumerate(p for name in "ab" for p in oftfx.adapter_parameters(model, name)):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(index))
    report = oftfx.export_openvino(model, tmp_path, adapters="inputs")
    assert report.path.name == "openvino_model_with_adapters.xml"
    request = openvino.Core().compile_model(report.path, "CPU", EXACT).create_infer_request()
    files = {name: load_file(tmp_path / f"{name}.safetensors") for name in "ab"}
    base = {n: np.broadcast_to(np.eye(16, dtype=np.float32), v.shape).copy() for n, v in files["a"].items()}
    answers = []
    for name, blocks in (("a", files["a"]), (None, base), ("b", files["b"])):
        for prompt in PROMPTS[:2]:
            request.reset_state()
            ids, got = prompt, []
            for _ in range(COUNT):
                total = len(prompt) + len(got)
                fed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, total), np.int64)}
                fed["position_ids"] = np.arange(total - len(ids), total)[None]
                logits = request.infer(fed | {"beam_idx": np.zeros(1, np.int32)} | blocks)["logits"]
                ids = [int(logits[0, -1].argmax())]
                got += ids
            if name is None:
                with oftfx.disable_adapters(model):
                    expected = greedy(model, prompt, COUNT)
            else:
                oftfx.set_adapter(model, name)
                expected = greedy(model, prompt, COUNT)
            assert same(got, expected, TIE), name
            answers.append(tuple(got))
    assert len(set(answers)) == 6
    with pytest.raises(RuntimeError):
        openvino_genai.LLMPipeline(str(tmp_path), "CPU")
    with pytest.raises(ExportError, match="expected 'fixed' or 'inputs'"):
        oftfx.export_openvino(model, tmp_path, adapters="swappable")


@pytest.mark.needs("gptqmodel")
def test_four_bits(tmp_path):
    """GPTQ with its own bits, by `MatMulNBits`; OpenVINO rounds inputs of such layers unless it is told not to."""
    from oftfx.formats.gptq import make_gptq

    model = made("qwen2")
    for path, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and path != "lm_head":
            model.set_submodule(path, make_gptq(layer, group_size=32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", oftfx.errors.OftfxWarning)
        adapted = randomize(oftfx.transform(model, {"all-linear": OFT(16)}), std=0.05)
        folded = oftfx.fold(adapted, quantized="requantize").model
    oftfx.export_openvino(folded, tmp_path)
    expected = [greedy(folded, p, COUNT) for p in PROMPTS]
    _, got = tokens_of(tmp_path, **EXACT)
    assert all(same(tokens, e, 0.02) for tokens, e in zip(got, expected, strict=True))
    stored = sum(f.stat().st_size for f in tmp_path.glob("*.bin"))
    floats = sum(p.numel() * 4 for n, p in folded.named_parameters() if "embed" in n or "lm_head" in n)
    assert stored < floats + 0.65 * 245_760  # weights in linear layers
