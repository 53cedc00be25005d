"""Train with transformers' Trainer: checkpoints, resuming, and the adapter alone at the end."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import oftfx
from oftfx import OFT

torch.manual_seed(0)
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=96, pad_token_id=0, **small))
tokens = (torch.randint(96, (32, 1)) + torch.arange(16)) % 96
rows = [{"input_ids": t, "labels": t} for t in tokens]

# --8<-- [start:train]
model = oftfx.transform(base, {"all-linear": OFT(32, share_input=True)})
arguments = TrainingArguments(
    "run", max_steps=20, learning_rate=1e-2, per_device_train_batch_size=8, save_steps=10,
    use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
)  # fmt: skip
callbacks = [oftfx.adapter_callback()]  # run/checkpoint-10/adapter, and so on
trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
trainer.train()
oftfx.save_adapter(model, "adapter")
# --8<-- [end:train]

# --8<-- [start:resume]
again = oftfx.transform(base, {"all-linear": OFT(32, share_input=True)})
resumed = Trainer(model=again, args=arguments, train_dataset=rows)
resumed.train(resume_from_checkpoint="run/checkpoint-10")
# --8<-- [end:resume]

losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
assert len(losses) == 1
with torch.no_grad():
    batch = {"input_ids": tokens, "labels": tokens}
    before, after, then = (m.eval()(**batch).loss for m in (base, model, again))
assert after < before - 0.2, (before, after)
assert abs(after - then) < 1e-6, (after, then)
last = oftfx.load_adapter(oftfx.transform(base, {"all-linear": OFT(32, share_input=True)}), "run/checkpoint-20/adapter")
assert torch.equal(last.eval()(**batch).loss, after)
torch.manual_seed(0)
loaded = oftfx.load_adapter(LlamaForCausalLM(base.config), "adapter")
mine, theirs = oftfx.adapter_parameters(model), oftfx.adapter_parameters(loaded)
assert torch.equal(mine[0], theirs[0])
