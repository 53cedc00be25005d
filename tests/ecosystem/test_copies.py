"""Copies, pickles and state dicts: each is a model of its own, with everything the original had."""

import copy
import io
import pickle

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import dense_twin, skews, values
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("transformers")
SHARE = pytest.mark.parametrize("share", [False, True])


def through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch": through_torch,
    "deepcopy-of-a-pickle": lambda m: copy.deepcopy(through_torch(m)),
}


@SHARE
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_independent_and_whole(rotated, ids, how, share):
    base, model = rotated(share)
    oftfx.add_adapter(model, "second", {"*.o_proj": OFT(8)})
    with torch.no_grad():
        expected = model(**ids()).logits  # also fills what eval mode keeps
        twin = COPIES[how](model)
        assert torch.equal(twin(**ids()).logits, expected)
    assert list(oftfx.adapters(twin)) == ["default", "second"]
    assert oftfx.active_adapters(twin) == ("default",)
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    randomize(twin, std=0.2, seed=5)
    assert rel(twin(**ids()).logits, dense_twin(base, twin)(**ids()).logits) < 1e-5
    assert torch.equal(model(**ids()).logits, expected)
    del model
    folded = oftfx.fold(twin).model
    assert rel(folded(**ids()).logits, dense_twin(base, twin)(**ids()).logits) < 1e-5


@SHARE
def test_a_copy_taken_between_forward_and_backward_trains(rotated, ids, share):
    _, model = rotated(share)
    loss = model(**ids(), labels=ids()["input_ids"]).loss
    twin = copy.deepcopy(model)
    loss.backward()
    assert all(p.grad is None for p in twin.parameters())
    assert all(p.grad is not None for p in skews(model).values())
    twin(**ids(), labels=ids()["input_ids"]).loss.backward()
    assert all(rel(p.grad, q.grad) < 1e-6 for p, q in zip(skews(twin).values(), skews(model).values(), strict=True))


def test_a_folded_model_is_copied_and_pickled_as_a_plain_one(rotated, ids):
    base, model = rotated()
    folded = oftfx.fold(model).model
    for how in COPIES.values():
        twin = how(folded)
        assert torch.equal(twin(**ids()).logits, folded(**ids()).logits)
        assert list(twin.state_dict()) == list(base.state_dict())
        assert not any(type(m).__module__.startswith("oftfx") for m in twin.modules())
        assert not any(m._forward_pre_hooks for m in twin.modules())


@SHARE
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_into_a_freshly_transformed_model(tiny_llama, rotated, ids, share, assign):
    base, model = rotated(share)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = oftfx.transform(tiny_llama(), {"all-linear": OFT(16, share_input=share)})
    with torch.no_grad():
        fresh(**ids())  # the blocks that eval mode keeps are those of the identity
        fresh.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
        assert rel(fresh(**ids()).logits, dense_twin(base, model)(**ids()).logits) < 1e-5
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    fresh(**ids()).logits.square().sum().backward()
    assert {n for n, p in fresh.named_parameters() if p.grad is not None} == set(skews(model))
    assert all(any(p is q for q in fresh.parameters()) for p in oftfx.adapter_parameters(fresh))


def test_assigned_twice_without_a_forward_between(rotated, ids):
    base, model = rotated()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(2):  # the first is freed, and its memory may serve the next
            chosen = {n: 0.2 * torch.randn(p.shape, generator=generator) for n, p in values(model).items()}
            model.load_state_dict(chosen, strict=False, assign=True)
        with torch.no_grad():
            assert rel(model(**ids()).logits, dense_twin(base, model)(**ids()).logits) < 1e-5, seed


def test_what_is_missing_and_what_is_unexpected_is_named(tiny_llama, rotated):
    base, model = rotated()
    incompatible = model.load_state_dict(base.state_dict(), strict=False)
    assert set(incompatible.missing_keys) == set(skews(model))
    assert not incompatible.unexpected_keys
    incompatible = tiny_llama().load_state_dict(model.state_dict(), strict=False)
    assert set(incompatible.unexpected_keys) == set(skews(model))
    assert not incompatible.missing_keys


def test_materialised_from_meta(tiny_llama, rotated, ids):
    base, model = rotated()
    with torch.device("meta"):
        empty = tiny_llama()
    shell = oftfx.transform(empty, {"all-linear": OFT(16)}).to_empty(device="cpu")
    shell.load_state_dict(model.state_dict())
    inv_freq = base.model.rotary_emb.inv_freq
    for name in ("inv_freq", "original_inv_freq"):
        setattr(shell.model.rotary_emb, name, inv_freq.clone())
    assert rel(shell(**ids()).logits, dense_twin(base, model)(**ids()).logits) < 1e-5


def test_shared_memory_and_threads(rotated, ids):
    from concurrent.futures import ThreadPoolExecutor

    base, model = rotated(True)
    model.share_memory()
    inputs = [ids(2, 5 + i, seed=i) for i in range(8)]
    twin = dense_twin(base, model)

    def run(batch):
        with torch.no_grad():
            return model(**batch).logits

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, inputs))
    assert all(rel(r, twin(**b).logits) < 1e-5 for r, b in zip(results, inputs, strict=True))
