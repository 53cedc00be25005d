"""What loops do to a model around a step: modes, casts, gradients on and off, iteration order."""

import gc
import weakref

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import dense_twin, skews
from tests.reference import dense_rotation, randomize, rel

pytestmark = pytest.mark.needs("transformers")
SHARE = pytest.mark.parametrize("share", [False, True])


def names(pairs):
    return [n for n, _ in pairs if ".oft" not in n]


@SHARE
def test_names_and_their_order_are_the_bases(rotated, share):
    base, model = rotated(share, tie_word_embeddings=True)
    for kind in ("named_parameters", "named_buffers", "named_modules", "named_children"):
        assert names(getattr(model, kind)()) == [n for n, _ in getattr(base, kind)()], kind
    duplicates = {"remove_duplicate": False}
    assert names(model.named_parameters(**duplicates)) == [n for n, _ in base.named_parameters(**duplicates)]
    assert [n for n in model.state_dict() if ".oft" not in n] == list(base.state_dict())
    assert all(model.get_parameter(n) is p for n, p in model.named_parameters())
    ours = {id(p) for p in skews(model).values()}
    assert [id(p) for p in model.parameters() if id(p) in ours] == [id(p) for p in oftfx.adapter_parameters(model)]


@SHARE
def test_train_and_eval_reach_every_module_and_change_nothing(rotated, ids, share):
    base, model = rotated(share)
    exact = dense_twin(base, model)(**ids()).logits
    results = []
    for mode in (True, False, True, False):
        assert model.train(mode) is model
        assert all(m.training is mode for m in model.modules())
        with torch.no_grad():
            results.append(model(**ids()).logits)
        results.append(model(**ids()).logits.detach())
    assert all(rel(r, exact) < 1e-5 for r in results)


def test_block_dropout_follows_the_mode(tiny_llama, ids):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16, dropout=0.5)}), std=0.2)
    with torch.no_grad():
        still = [model.eval()(**ids()).logits for _ in range(2)]
        moving = [model.train()(**ids()).logits for _ in range(2)]
    assert torch.equal(*still)
    assert rel(*moving) > 1e-3


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(rotated, ids, set_to_none):
    _, model = rotated()
    model(**ids()).logits.square().sum().backward()
    model.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for p in skews(model).values()]
    assert all(g is None for g in grads) if set_to_none else all(not g.any() for g in grads)
    assert all(p.grad is None for n, p in model.named_parameters() if ".oft." not in n)


@SHARE
def test_gradients_switched_off_and_on(rotated, ids, share):
    _, model = rotated(share)
    model.requires_grad_(False)
    assert not model(**ids()).logits.requires_grad
    for parameter in oftfx.adapter_parameters(model):
        parameter.requires_grad_(True)
    model(**ids()).logits.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(skews(model))


@SHARE
def test_an_unfrozen_base_gets_the_gradients_of_the_plain_model(rotated, ids, share):
    base, model = rotated(share, dtype=torch.float64)
    model.requires_grad_(True)
    twin = dense_twin(base, model)
    for network in (model, twin):
        network(**ids(), labels=ids()["input_ids"]).loss.backward()
    theirs = {n: p.grad for n, p in twin.named_parameters()}
    for entry in oftfx.adapters(model)["default"]:  # W' = W R^T, so dL/dW = dL/dW' R
        skew = model.get_parameter(f"{entry.owner}.oft.default.skew").detach()
        theirs[f"{entry.fqn}.weight"] @= dense_rotation(skew, entry.block_size, entry.blocks)
    for name, expected in theirs.items():
        assert rel(model.get_parameter(name).grad, expected) < 1e-9, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@SHARE
def test_a_cast_between_two_eval_forwards(rotated, ids, dtype, share):
    """Blocks kept in the old dtype must go."""
    base, model = rotated(share)
    with torch.no_grad():
        model(**ids())
        model.to(dtype)
        bound = {torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        assert rel(model(**ids()).logits, dense_twin(base, model)(**ids()).logits) < bound
        assert model(**ids()).logits.dtype == dtype
        model.float()
        assert model(**ids()).logits.dtype == torch.float32


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_by_name_reach_rotations_and_keep_what_trains(rotated, cast):
    _, model = rotated()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    assert getattr(model, cast)() is model
    assert len({p.dtype for p in model.parameters()}) == 1
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert [id(p) for p in oftfx.adapter_parameters(model)] == [id(p) for p in skews(model).values()]


@SHARE
def test_inference_mode_then_training(rotated, ids, share):
    base, model = rotated(share)
    with torch.inference_mode():
        got = model(**ids()).logits
    assert rel(got.clone(), dense_twin(base, model)(**ids()).logits) < 1e-5
    for mode in (False, True):
        model.train(mode)(**ids()).logits.square().sum().backward()
    assert all(p.grad is not None for p in skews(model).values())


@SHARE
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_outlives_a_forward(rotated, ids, share, grad):
    """A hidden state that a rotation has seen is freed when the caller drops the output."""
    _, model = rotated(share)
    seen = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda m, a, k: seen.append(weakref.ref(k["hidden_states"])), with_kwargs=True
    )
    with torch.set_grad_enabled(grad):
        model(**ids(), use_cache=False)
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None


def test_hooks_of_the_user_see_the_layers_calls(rotated, ids):
    _, model = rotated()
    layer, calls = model.model.layers[0].mlp.up_proj, []
    handles = [
        layer.register_forward_hook(lambda m, a, y: calls.append("forward")),
        layer.register_full_backward_hook(lambda m, i, o: calls.append("backward")),
        layer.register_state_dict_pre_hook(lambda m, prefix, keep: calls.append(prefix)),
    ]
    model(**ids()).logits.square().sum().backward()
    model.state_dict()
    assert calls == ["forward", "backward", "model.layers.0.mlp.up_proj."]
    for handle in handles:
        handle.remove()
    assert rel(oftfx.fold(model).model(**ids()).logits, model(**ids()).logits) < 1e-5


def test_apply_initialises_only_what_it_names(rotated, ids):
    base, model = rotated()

    def zero_bias(module):
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.zeros_(module.bias)

    before = {n: p.clone() for n, p in skews(model).items()}
    model.apply(zero_bias)
    assert all(torch.equal(p, before[n]) for n, p in skews(model).items())
    assert not model.model.layers[0].self_attn.q_proj.bias.any()
    assert rel(model(**ids()).logits, dense_twin(base, model)(**ids()).logits) < 1e-5
