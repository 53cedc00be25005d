"""Several adapters in one model: add, switch, compose, silence, mix in a batch, remove."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oftfx
from oftfx import OFT

torch.manual_seed(0)
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, **small)).eval()
inputs = {"input_ids": torch.randint(96, (2, 8))}

# --8<-- [start:add]
model = oftfx.transform(base, {"*_proj": OFT(16)}, adapter="news")
# Other sites, other block size; it does not act yet.
oftfx.add_adapter(model, "code", {"*.mlp.*": OFT(8)})
# --8<-- [end:add]
for name in ("news", "code"):
    for parameter in oftfx.adapter_parameters(model, name):
        torch.nn.init.normal_(parameter, std=0.05)  # instead of training


@torch.no_grad()
def logits() -> torch.Tensor:
    """Of the model with the adapters that act now."""
    return model(**inputs).logits


# --8<-- [start:switch]
oftfx.set_adapter(model, "code")  # one
one = logits()
oftfx.set_adapter(model, ["news", "code"])  # both: x -> R_news -> R_code -> W
both = logits()
oftfx.set_adapter(model, None)  # none: the base model
none = logits()
oftfx.set_adapter(model, ["news", "code"])
with oftfx.disable_adapters(model):  # the same for a while
    silent = logits()
print(oftfx.active_adapters(model), list(oftfx.adapters(model)))
# --8<-- [end:switch]

# --8<-- [start:rows]
with oftfx.adapter_rows(model, ["code", None]):  # the first row's adapter, none for the second
    mixed = logits()
# --8<-- [end:rows]

# --8<-- [start:fold]
folded = oftfx.fold(model)  # those that act, in their order
only_code = oftfx.fold(model, adapter="code")  # the report names the ones that are dropped
oftfx.remove_adapter(model, "news")
# --8<-- [end:fold]

with torch.no_grad():
    plain = base(**inputs).logits
    assert torch.equal(none, plain)
    assert torch.equal(silent, plain)
    assert (folded.model(**inputs).logits - both).norm() < 1e-5 * both.norm()
    assert (only_code.model(**inputs).logits - one).norm() < 1e-5 * one.norm()
assert (both - one).norm() > 0.01 * one.norm()
for row, expected in zip(mixed, (one[0], none[1]), strict=True):
    assert (row - expected).norm() < 1e-5 * expected.norm()
assert only_code.report.dropped == ("news",)
assert list(oftfx.adapters(model)) == ["code"]
