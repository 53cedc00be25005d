"""Plan, transform, train, save, fold, export: the example of the README, on a tiny Llama with random weights."""

# --8<-- [start:readme]
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oftfx

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes))
tokens = torch.randint(256, (4, 32))
batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
print(oftfx.plan(base, "all-linear"))  # what would be rotated, what not, and why
model = oftfx.transform(base, {"*_proj": oftfx.OFT(16, share_input=True)})
optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=1e-2)
for _ in range(10):
    model(**batch, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
oftfx.save_adapter(model, "adapter")  # a directory that PEFT loads
result = oftfx.fold(model, calibration=[batch])
print(result.report)
print(oftfx.export_onnx(result.model, "model.onnx", batch))
# --8<-- [end:readme]

with torch.no_grad():
    before, after = model.eval()(**batch).logits, result.model.eval()(**batch).logits
    assert (before - base.eval()(**batch).logits).norm() > 0.01 * before.norm(), "the training changed nothing"
assert (before - after).norm() < 1e-5 * before.norm()
assert not any("oft" in name for name in result.model.state_dict())
