"""Gradient checkpointing: the gradients are those without it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import gradients
from tests.reference import randomize, rel

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])
SHARE = pytest.mark.parametrize("share", [False, True])


def backward(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return gradients(model)


def same(got, expected):
    assert got.keys() == expected.keys()
    assert all(rel(got[n], expected[n]) < 1e-12 for n in expected)


@pytest.mark.needs("transformers")
@REENTRANT
@SHARE
@pytest.mark.parametrize("require_inputs", [False, True])
def test_a_transformers_model(rotated, ids, reentrant, share, require_inputs):
    _, model = rotated(share, dtype=torch.float64)
    batch = {**ids(), "labels": ids()["input_ids"]}
    expected = backward(model.train(), batch)
    calls = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if require_inputs or reentrant:  # the reentrant kind needs an input with a gradient, as for any adapter
        model.enable_input_require_grads()
    same(backward(model, batch), expected)
    assert len(calls) == 2  # forward and recomputation
    model.activation_checkpointing_disable()
    handle.remove()
    same(backward(model, batch), expected)


@pytest.mark.needs("transformers")
@REENTRANT
def test_an_encoder_with_dropout(tiny_bert, ids, reentrant):
    base = tiny_bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1).double()
    spec = OFT(8, dropout=0.3, share_input=True)
    model = randomize(oftfx.transform(base, {"all-linear": spec}), std=0.1).train()
    model.enable_input_require_grads()
    results = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(11)
        model.zero_grad()
        model(**ids(), labels=torch.tensor([0, 1])).loss.backward()
        results.append(gradients(model))
    same(results[1], results[0])


class Attention(torch.nn.Module):
    """Three layers that read one tensor, any part of it recomputed."""

    def __init__(self, reentrant=None, part="all"):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(12, 12, dtype=torch.float64) for _ in range(3))
        self.reentrant, self.part = reentrant, part

    def forward(self, x):
        def run(layer, *inputs):
            if self.reentrant is None or self.part == "all":
                return layer(*inputs)
            return checkpoint(layer, *inputs, use_reentrant=self.reentrant)

        def mix(x):
            q, k = run(self.q, x), self.k(x)
            v = run(self.v, x) if self.part == "two" else self.v(x)
            return torch.softmax(q @ k.transpose(-1, -2), -1) @ v

        if self.reentrant is not None and self.part == "all":
            return checkpoint(mix, x, use_reentrant=self.reentrant)
        return mix(x)


@REENTRANT
@pytest.mark.parametrize("part", ["all", "one", "two"])
def test_parts_of_a_group_that_shares_its_input(reentrant, part):
    base, x = Attention(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    results = []
    for checkpointed in (False, True):
        model = oftfx.transform(base, {"all-linear": OFT(4, share_input=True)}, example_inputs=(x.detach(),))
        assert len(oftfx.adapter_parameters(model)) == 1
        model.reentrant, model.part = (reentrant, part) if checkpointed else (None, part)
        randomize(model.train(), std=0.2)
        x.grad = None
        for _ in range(2):  # twice: nothing may linger from the first
            model(x).square().sum().backward()
        results.append({**gradients(model), "x": x.grad.clone()})
    same(results[1], results[0])


def test_selective_checkpointing():
    """Products are kept, everything else is computed again."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts as contexts

    base, x = Attention(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    model = oftfx.transform(base, {"all-linear": OFT(4, share_input=True)}, example_inputs=(x.detach(),))
    randomize(model.train(), std=0.2)
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    keep = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default]
    checkpoint(model, x, use_reentrant=False, context_fn=lambda: contexts(keep)).square().sum().backward()
    same(gradients(model), expected)


@REENTRANT
def test_a_sequential_model(reentrant):
    layers = [torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Tanh()) for _ in range(4)]
    model = randomize(oftfx.transform(torch.nn.Sequential(*layers).double(), {"all-linear": OFT(4)}), std=0.2)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    checkpoint_sequential(model, 2, x, use_reentrant=reentrant).square().sum().backward()
    same(gradients(model), expected)
