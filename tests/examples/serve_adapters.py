"""A model repository for a server, written and then run here without the server: the runtime that it copies answers."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oftfx
from oftfx import OFT
from oftfx.serving import Request, ServedModel, write_repository

torch.manual_seed(0)
small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **small)).eval()
model = oftfx.transform(base, {"*_proj": OFT(8)}, adapter="a1")
oftfx.add_adapter(model, "a2", {"*_proj": OFT(8)})
for name in ("a1", "a2"):
    for parameter in oftfx.adapter_parameters(model, name):
        torch.nn.init.normal_(parameter, std=0.1)  # instead of training
oftfx.set_adapter(model, "a1")
batch = {"input_ids": torch.randint(64, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}

# --8<-- [start:export]
oftfx.export_onnx(model, "tenants.onnx", batch, adapters="swappable")
oftfx.export_onnx_adapter(model, "a1.onnx_adapter", adapter="a1")
oftfx.export_onnx_adapter(model, "a2.onnx_adapter", adapter="a2")
# --8<-- [end:export]

# --8<-- [start:write]
files = {"a1": "a1.onnx_adapter", "a2": "a2.onnx_adapter"}
written = write_repository("tenants.onnx", "mlserver", server="mlserver", adapters=files)
print(written)  # what was written, and the command that starts the server
# --8<-- [end:write]

# --8<-- [start:without]
served = ServedModel("tenants.onnx", adapters=written.model / "adapters")
arrays = {name: value.numpy() for name, value in batch.items()}
answer = served.run(Request(arrays, {"adapter": "a2"}))
# --8<-- [end:without]

oftfx.set_adapter(model, "a2")
with torch.no_grad():
    expected = model(**batch).logits
    oftfx.set_adapter(model, "a1")
    other = model(**batch).logits
logits = torch.from_numpy(answer["logits"])
assert (logits - expected).abs().max() < 2e-6
assert (logits - other).abs().max() > 1e-3, "the adapters are the same, so the check above says nothing"
