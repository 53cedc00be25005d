"""A language model on an NF4 base: plan, transform, train, save, fold by each policy, keep the best, export.

The model is a tiny Llama with random weights, so that it runs in seconds; a real one differs in its directory only.
"""

import math

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import oftfx
from oftfx import OFT

torch.manual_seed(0)
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, **small)).save_pretrained("float")
# Sequences that count up from a random start: something that a random model does not know.
starts = torch.randint(96, (24, 1))
tokens = (starts + torch.arange(24)) % 96
batches = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens[:16].split(4)]
held_out = {"input_ids": tokens[16:], "attention_mask": torch.ones_like(tokens[16:])}

# --8<-- [start:load]
four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.float32,
)
base = AutoModelForCausalLM.from_pretrained(
    "float",  # a directory or the name of a model
    quantization_config=four_bits,
    dtype=torch.float32,
)
# --8<-- [end:load]

# --8<-- [start:plan]
print(oftfx.plan(base, {"all-linear": OFT(32)}))
# --8<-- [end:plan]

# --8<-- [start:transform]
model = oftfx.transform(base, {"all-linear": OFT(32)})
# --8<-- [end:transform]

# --8<-- [start:train]
optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=5e-3)
model.train()
for _ in range(15):
    for batch in batches:
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
model.eval()
# --8<-- [end:train]

# --8<-- [start:save]
oftfx.save_adapter(model, "adapter")  # in PEFT's files
# --8<-- [end:save]


@torch.no_grad()
def loss_of(a_model: torch.nn.Module) -> float:
    """Mean negative log-likelihood of the held-out tokens."""
    return float(a_model(**held_out, labels=held_out["input_ids"]).loss)


# --8<-- [start:fold]
with oftfx.disable_adapters(model):
    without = loss_of(model)
gain = without - loss_of(model)
for policy in ("keep", "float", "requantize", "calibrate"):
    folded = oftfx.fold(model, quantized=policy, calibration=batches)
    kept = (without - loss_of(folded.model)) / gain
    print(f"{policy:10} keeps {kept:6.1%}, error {folded.report.output_error:.1e}")
# --8<-- [end:fold]

# --8<-- [start:report]
result = oftfx.fold(model, quantized="calibrate", calibration=batches)
print(result.report)  # warnings, actions, errors, bytes, perplexity before and after
for site in result.report:
    print(site.fqn, site.action, site.output_error, site.output_survival)
# --8<-- [end:report]

# --8<-- [start:export]
inputs = held_out
exact = oftfx.fold(model)  # "keep": NF4 weights as they are, rotations in front
print(oftfx.export_onnx(exact.model, "model.onnx", inputs))
# --8<-- [end:export]

assert gain > 0.2, f"the adapter learnt nothing: {gain}"
errors = {p: oftfx.fold(model, quantized=p, calibration=batches).report.output_error for p in ("keep", "float")}
assert max(errors.values()) < 1e-5, errors
rounded = oftfx.fold(model, quantized="requantize", calibration=batches).report.output_error
assert 1e-3 < result.report.output_error < rounded, (result.report.output_error, rounded)
assert math.isfinite(loss_of(result.model))
assert oftfx.unfold(result).state_dict().keys() == model.state_dict().keys()
