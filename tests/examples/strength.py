"""Half an adapter, a blend of two, how far apart they are, what a strength keeps; and LoRA for a server."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oftfx
from oftfx import OFT

torch.manual_seed(0)
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, **small)).eval()
inputs = {"input_ids": torch.randint(96, (2, 16))}
trained = oftfx.transform(base, {"*_proj": OFT(16)})
for parameter in oftfx.adapter_parameters(trained):
    torch.nn.init.normal_(parameter, std=0.03)  # instead of training
oftfx.save_adapter(trained, "news")
model = base

# --8<-- [start:strength]
oftfx.load_adapter(model, "news")
oftfx.blend(model, {"default": 0.5}, into="mild")
oftfx.set_adapter(model, "mild")
# --8<-- [end:strength]
oftfx.add_adapter(model, "code", {"*.mlp.*": OFT(32, parameterization="cayley")})
for parameter in oftfx.adapter_parameters(model, "code"):
    torch.nn.init.normal_(parameter, std=0.03)

# --8<-- [start:blend]
report = oftfx.blend(model, {"default": 0.5, "code": 0.5}, into="both")
print(report)  # report.table() has a row for each rotation
# --8<-- [end:blend]

# --8<-- [start:angles]
print(oftfx.rotation_angles(model, "mild"))
print(oftfx.adapter_distance(model, "default", "code"))
# --8<-- [end:angles]


# --8<-- [start:retention]
def loss(model: torch.nn.Module) -> float:
    """Of the base's task; another function for the new one."""
    return float(model(**inputs, labels=inputs["input_ids"]).loss)


curve = oftfx.retention(model, {"base task": loss, "new task": loss}, strengths=(0, 0.5, 1))
print(curve)  # curve["base task"] is {strength: score}
# --8<-- [end:retention]

# --8<-- [start:lora]
lora = oftfx.to_lora(model, "news-lora", energy=0.95, calibration=[inputs])
print(lora)  # lora.table() has rank and loss of each layer
# --8<-- [end:lora]

whole, mild = oftfx.rotation_angles(model), oftfx.rotation_angles(model, "mild")
for site, half in zip(whole, mild, strict=True):
    assert abs(half.largest - site.largest / 2) < 1e-6
assert oftfx.active_adapters(model) == ("mild",)
assert {s.block_size for s in report} == {16, 32}
assert curve["base task"] == curve["new task"]
assert lora.loss <= 0.05
