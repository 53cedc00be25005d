"""An adapter on a base that vLLM does not read, served in 4 bits all the same."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oftfx
from oftfx.formats.bnb8 import make_linear8bit

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=131, **sizes)).eval()
for name, layer in list(base.named_modules()):
    if isinstance(layer, torch.nn.Linear) and name != "lm_head":
        base.set_submodule(name, make_linear8bit(layer))
model = oftfx.transform(base, {"all-linear": oftfx.OFT(16, init="normal")}).eval()
inputs = [{"input_ids": torch.randint(0, 131, (8, 48))} for _ in range(8)]

# --8<-- [start:quantize]
floats = oftfx.fold(model, quantized="float").model
result = oftfx.quantize(floats, group_size=32, calibration=inputs)
print(result.report)
result.save("served", save_as="compressed-tensors", server="vllm")
# --8<-- [end:quantize]

with torch.no_grad():
    wanted, got = model(**inputs[0]).logits, oftfx.load_folded("served")(**inputs[0]).logits
assert (got - wanted).norm() < 0.2 * wanted.norm()
