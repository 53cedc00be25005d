"""A directory that ONNX Runtime GenAI runs, with the adapter chosen for each generation."""

import onnxruntime_genai
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import oftfx
from oftfx import OFT

torch.manual_seed(0)
# A tokenizer of single characters; a real model has one of its own.
alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:94], "\u0120"]
words = Tokenizer(models.BPE({c: i for i, c in enumerate(["<unk>", "<end>", *alphabet])}, [], unk_token="<unk>"))
words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
config = LlamaConfig(vocab_size=128, eos_token_id=1, max_position_embeddings=64, initializer_range=0.3, **small)
model = oftfx.transform(LlamaForCausalLM(config).eval(), {"*_proj": OFT(16)}, adapter="news")
for parameter in oftfx.adapter_parameters(model):
    torch.nn.init.normal_(parameter, std=0.1)  # instead of training

# --8<-- [start:export]
oftfx.export_genai(model, "server", tokenizer=tokenizer, adapters="swappable")
# --8<-- [end:export]

# --8<-- [start:generate]
served = onnxruntime_genai.Model("server")
adapters = onnxruntime_genai.Adapters(served)
adapters.load("server/news.onnx_adapter", "news")
parameters = onnxruntime_genai.GeneratorParams(served)
parameters.set_search_options(max_length=24)
generator = onnxruntime_genai.Generator(served, parameters)
generator.set_active_adapter(adapters, "news")  # left out: the base model
generator.append_tokens(onnxruntime_genai.Tokenizer(served).encode("once upon"))
while not generator.is_done():
    generator.generate_next_token()
# --8<-- [end:generate]

got = generator.get_sequence(0).tolist()
prompt = tokenizer("once upon", return_tensors="pt")["input_ids"]
with torch.no_grad():
    settings = {"attention_mask": torch.ones_like(prompt), "max_length": 24, "do_sample": False}
    expected = model.generate(prompt, **settings)[0].tolist()
    oftfx.set_adapter(model, None)
    plain = model.generate(prompt, **settings)[0].tolist()
assert got[: len(expected)] == expected[: len(got)], (got, expected)
assert len(got) > prompt.shape[1] + 3, "it stopped at once, so the check says nothing"
assert expected != plain, "the adapter changes no token, so the check says nothing"
