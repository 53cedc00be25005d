"""A folded model as one file for llama.cpp."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import oftfx

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=131, **sizes)).eval()
model = oftfx.transform(base, {"all-linear": oftfx.OFT(16, init="normal")}).eval()
tokenizer = None  # a real model has one: itself, or the directory that has it

# --8<-- [start:export]
folded = oftfx.fold(model).model
report = oftfx.export_gguf(folded, "model.gguf", tokenizer=tokenizer)
print(report)
print(oftfx.export_gguf(folded, "small.gguf", tokenizer=tokenizer, quantized="Q8_0"))  # says what rounding cost
# --8<-- [end:export]

assert report.lossless
ids = torch.randint(0, 131, (2, 9))
read = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32).eval()
with torch.no_grad():
    assert torch.allclose(read(ids).logits, model(ids).logits, atol=1e-5)
    assert not torch.allclose(base(ids).logits, read(ids).logits, atol=1e-2)
