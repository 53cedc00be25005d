"""One ONNX Runtime session that serves the base model and every adapter; and one graph with a choice for each row."""

import numpy as np
import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oftfx
from oftfx import OFT
from oftfx.onnx.decoders.generate import greedy

torch.manual_seed(0)
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, initializer_range=0.2, **small)).eval()
model = oftfx.transform(base, {"*_proj": OFT(16)}, adapter="news")
oftfx.add_adapter(model, "code", {"*_proj": OFT(16)})  # the same sites and block sizes: they share a graph
for name in ("news", "code"):
    for parameter in oftfx.adapter_parameters(model, name):
        torch.nn.init.normal_(parameter, std=0.05)  # instead of training
batch = {"input_ids": torch.randint(1, 96, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
feed = {name: value.numpy() for name, value in batch.items()}

# --8<-- [start:export]
oftfx.export_onnx(model, "tenants.onnx", batch, adapters="swappable")
for name in oftfx.adapters(model):
    file = f"{name}.onnx_adapter"
    oftfx.export_onnx_adapter(model, file, adapter=name, graph="tenants.onnx")
# --8<-- [end:export]

# --8<-- [start:run]
quiet = onnxruntime.SessionOptions()
quiet.log_severity_level = 3  # it warns of every input that has a default
session = onnxruntime.InferenceSession("tenants.onnx", quiet)
loaded = {}  # keep these: one that is garbage-collected stops acting, without an error
for name in ("news", "code"):
    loaded[name] = onnxruntime.LoraAdapter()
    loaded[name].Load(f"{name}.onnx_adapter")


def answer(adapter: str | None) -> np.ndarray:
    """Logits of one request, with an adapter or (None) of the base model."""
    options = onnxruntime.RunOptions()
    if adapter is not None:
        options.add_active_adapter(loaded[adapter])
    return session.run(["logits"], feed, options)[0]


# --8<-- [end:run]

# --8<-- [start:mixed]
oftfx.export_onnx(model, "mixed.onnx", batch, adapters="mixed")
mixed = onnxruntime.InferenceSession("mixed.onnx")
rows = np.array([2, 0])  # 0: the base model, 1: news, 2: code, as in oftfx.adapters
logits = mixed.run(["logits"], {**feed, "adapter_index": rows})[0]
# --8<-- [end:mixed]

# --8<-- [start:decode]
oftfx.export_onnx(model, "decoder.onnx", cache=True, adapters="swappable")
decoder = onnxruntime.InferenceSession("decoder.onnx", quiet)
options = onnxruntime.RunOptions()
options.add_active_adapter(loaded["news"])
tokens = greedy(decoder, feed["input_ids"], 6, run_options=options)
# --8<-- [end:decode]


@torch.no_grad()
def expected(adapter: str | None) -> torch.Tensor:
    """What torch computes."""
    oftfx.set_adapter(model, adapter)
    return model(**batch).logits


def distance(got: np.ndarray, want: torch.Tensor) -> float:
    """Relative, Frobenius."""
    return float((torch.from_numpy(got) - want).norm() / want.norm())


for name in (None, "news", "code"):
    assert distance(answer(name), expected(name)) < 1e-5, name
assert distance(answer("news"), expected("code")) > 0.05, "the two adapters are the same, so the checks say nothing"
assert distance(logits[:1], expected("code")[:1]) < 1e-5
assert distance(logits[1:], expected(None)[1:]) < 1e-5
oftfx.set_adapter(model, "news")
torch_tokens = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, 8:]
assert tokens.tolist() == torch_tokens.tolist(), (tokens, torch_tokens)
