"""Every way to say what is rotated, and how. The first rule that matches a layer wins."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oftfx
from oftfx import OFT, Rule

small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
with torch.device("meta"):  # a plan needs no weights
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **small))


# --8<-- [start:sites]
def sites(rules: object) -> list[str]:
    """Paths of the layers that a set of rules rotates."""
    return [entry.fqn for entry in oftfx.plan(model, rules)]


# --8<-- [end:sites]

# --8<-- [start:short]
# Every linear layer but the output head, with the defaults of OFT:
everything = sites("all-linear")
# Globs for the whole path; `*` also crosses dots:
globs = sites({"*.self_attn.*": OFT(16), "*.mlp.*": OFT(32, share_input=True)})
# --8<-- [end:short]

# --8<-- [start:long]
some = sites(
    [
        # None excludes: the first layer stays as it is.
        Rule("model.layers.0.*", None),
        # A regular expression, for the whole path.
        Rule(r"re:.*\.(q|k|v)_proj", OFT(16)),
        # A function of the Site.
        Rule(lambda site: site.out_features == 128, OFT(blocks=4)),
        # A class of modules.
        Rule(torch.nn.Embedding, OFT(8)),
        # It may match nothing; without `optional` that is an error.
        Rule("*.vision.*", OFT(16), optional=True),
    ]
)
# --8<-- [end:long]

# --8<-- [start:toml]
Path("rules.toml").write_text(
    """
    [[rule]]
    target = "*.mlp.down_proj"
    exclude = true

    [[rule]]
    target = "*.mlp.*"
    block_size = 32
    share_input = true
    """
)
from_file = sites("rules.toml")
# --8<-- [end:toml]

assert len(everything) == len(globs) == 14
assert some == [
    "model.embed_tokens",
    *(f"model.layers.1.self_attn.{n}_proj" for n in "qkv"),
    *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")),
]
assert from_file == [f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up")]
