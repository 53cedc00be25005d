"""An adapter that PEFT trained: read, folded, saved back; and PEFT's configuration as rules."""

import torch
from peft import OFTConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import oftfx

torch.manual_seed(0)
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def base() -> LlamaForCausalLM:
    """The base model, always with the same weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, **small)).eval()


batch = {"input_ids": torch.randint(96, (2, 16))}

# --8<-- [start:peft]
config = OFTConfig(oft_block_size=16, target_modules=["q_proj", "v_proj"])
theirs = get_peft_model(base(), config)
trainable = [p for p in theirs.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=1e-2)
for _ in range(5):
    theirs(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
theirs.save_pretrained("peft-adapter")
# --8<-- [end:peft]

# --8<-- [start:load]
# Instead of PeftModel.from_pretrained(base(), "peft-adapter"):
model = oftfx.load_adapter(base(), "peft-adapter")
# Instead of merge_and_unload():
folded = oftfx.fold(model).model
# --8<-- [end:load]

# --8<-- [start:rules]
# Instead of get_peft_model(base(), config):
mine = oftfx.transform(base(), config)
# --8<-- [end:rules]

# --8<-- [start:back]
oftfx.save_adapter(model, "my-adapter")
back = PeftModel.from_pretrained(base(), "my-adapter")
# --8<-- [end:back]

with torch.no_grad():
    expected, plain = theirs.eval()(**batch).logits, base()(**batch).logits
    found = {name: m.eval()(**batch).logits for name, m in {"read": model, "folded": folded, "back": back}.items()}
assert (expected - plain).norm() > 0.01 * plain.norm(), "PEFT's training changed nothing"
for name, logits in found.items():
    assert (logits - expected).norm() < 2e-6 * expected.norm(), name
assert sum(p.numel() for p in oftfx.adapter_parameters(mine)) == theirs.get_nb_trainable_parameters()[0]
