"""Save what a fold made, by any policy, and read it back."""

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import oftfx
from oftfx import OFT

torch.manual_seed(0)
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, **small)).save_pretrained("float")
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained("float", quantization_config=four_bits, dtype=torch.float32)
model = oftfx.transform(base, {"all-linear": OFT(32)}).eval()
for parameter in oftfx.adapter_parameters(model):
    torch.nn.init.normal_(parameter, std=0.05)  # instead of training
inputs = {"input_ids": torch.randint(96, (2, 16))}

# --8<-- [start:save]
result = oftfx.fold(model)  # "keep": NF4 weights as they are, rotations in front
result.save("folded")  # checkpoint, rotations, a note of what was done
again = oftfx.load_folded("folded")
# --8<-- [end:save]

with torch.no_grad():
    expected, found, plain = (m.eval()(**inputs).logits for m in (model, again, base))
assert (found - expected).norm() < 1e-5 * expected.norm()
assert (expected - plain).norm() > 0.05 * plain.norm(), "the rotations do nothing, so the check above says nothing"
