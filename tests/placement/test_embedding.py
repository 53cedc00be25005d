"""Embeddings rotate what they give out."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import RuleError
from tests.reference import dense_rotation, randomize, rel


class Net(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.embed = nn.Embedding(13, 12, **settings)

    def forward(self, ids):
        return self.embed(ids)


@pytest.mark.parametrize("settings", [{}, {"padding_idx": 0}, {"max_norm": 1.5}, {"max_norm": 2.0, "norm_type": 1.0}])
@pytest.mark.parametrize("parameterization", ["cayley", "cayley_neumann"])
def test_rows_are_rotated_and_folded(settings, parameterization):
    base = Net(**settings).requires_grad_(False)
    original = base.embed.weight.double().clone()
    ids = torch.randint(0, 13, (2, 3, 5))
    untouched = copy.deepcopy(base)(ids)  # with max_norm, every look-up shortens rows in place
    model = oftfx.transform(base, {"embed": OFT(4, parameterization=parameterization)})
    assert torch.equal(model(ids), untouched)
    randomize(model, std=0.3)
    if "max_norm" in settings:
        sizes = original.norm(p=settings.get("norm_type", 2.0), dim=1, keepdim=True)
        original = original * (settings["max_norm"] / (sizes + 1e-7)).clamp(max=1)
    rotation = dense_rotation(model.embed.oft.default.skew.detach(), 4, parameterization=parameterization)
    expected = original[ids] @ rotation
    assert rel(model(ids), expected) < 1e-6
    result = oftfx.fold(model)
    assert rel(result.model(ids), expected) < 1e-6
    assert result.model.embed.max_norm is None
    restored = oftfx.unfold(result)
    assert restored.embed.max_norm == settings.get("max_norm")
    assert torch.equal(restored(ids), model(ids))


def test_sparse_gradients_are_refused():
    with pytest.raises(RuleError, match=r"sparse=True: gradients of a rotation are dense"):
        oftfx.plan(Net(sparse=True), {"embed": OFT(4)})


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("rotated", ["model.embed_tokens", "lm_head"])
def test_folding_one_of_two_tied_layers_leaves_the_other(tiny_llama, ids, tmp_path, rotated):
    base = tiny_llama(tie_word_embeddings=True)
    model = randomize(oftfx.transform(base, {rotated: OFT(16)}), std=0.2)
    hidden, tokens = torch.randn(2, 3, 64), ids()["input_ids"]
    folded = oftfx.fold(model).model
    other = {"model.embed_tokens": lambda m: m.lm_head(hidden), "lm_head": lambda m: m.model.embed_tokens(tokens)}
    assert torch.equal(other[rotated](folded), other[rotated](base))
    assert rel(folded(**ids()).logits, model(**ids()).logits) < 1e-5
    assert rel(base(**ids()).logits, model(**ids()).logits) > 1e-2
    folded.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**ids()).logits, folded(**ids()).logits)
