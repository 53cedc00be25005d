"""Autocast, narrow models and gradient scaling, against the plain model with rotated weights."""

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import dense_twin, gradients, mlp, skews
from tests.reference import randomize, rel

SHARE = pytest.mark.parametrize("share", [False, True])
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def error_of(model, exact, batch):
    return rel(model(**batch).logits, exact(**batch).logits)


@pytest.mark.needs("transformers")
@SHARE
@NARROW
def test_a_narrow_model_is_as_exact_as_a_plain_narrow_one(rotated, ids, dtype, share):
    """Against float64 of the same narrow weights; the plain model is the dense twin, rounded once."""
    base, model = rotated(share, dtype=dtype)
    assert all(p.dtype == torch.float32 for p in skews(model).values())
    exact = dense_twin(base.double(), model)
    base.to(dtype)
    plain = dense_twin(base, model)
    allowed = 2.0 * error_of(plain, exact, ids())
    for mode in (True, False):
        out = model.train(mode)(**ids()).logits
        assert out.dtype == dtype
        assert rel(out, exact(**ids()).logits) < allowed
    folded = oftfx.fold(model).model
    assert all(p.dtype == dtype for p in folded.parameters())
    assert error_of(folded, exact, ids()) < allowed


@pytest.mark.needs("transformers")
@SHARE
@NARROW
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_and_trains(rotated, ids, share, dtype, model_dtype):
    base, model = rotated(share, dtype=model_dtype)
    batch = {**ids(), "labels": ids()["input_ids"]}
    base.double()
    exact = oftfx.transform(base, {"all-linear": OFT(16, share_input=share)}).train()
    exact.load_state_dict(model.state_dict())
    assert rel(exact(**batch).logits, dense_twin(base, model)(**batch).logits) < 1e-7
    exact(**batch).loss.backward()
    with torch.autocast("cpu", dtype=dtype):
        out = model.train()(**batch)
    assert out.logits.dtype == dtype
    assert 1e-5 < rel(out.logits, exact(**batch).logits) < 3e-2
    out.loss.backward()
    got, expected = gradients(model), gradients(exact)
    assert set(got) == set(skews(model))
    assert all(g.dtype == torch.float32 for g in got.values())
    assert all(rel(got[n], expected[n]) < 0.15 for n in expected)


@pytest.mark.needs("transformers")
def test_what_eval_mode_keeps_is_not_mistaken_inside_autocast(rotated, ids):
    _, model = rotated(True)
    with torch.no_grad():
        for _ in range(2):
            wide = model(**ids()).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                narrow = model(**ids()).logits
            assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
            assert rel(narrow, wide) < 3e-2
        assert torch.equal(model(**ids()).logits, wide)


def test_the_blocks_are_computed_in_float32_inside_autocast():
    """With weights and inputs that bfloat16 holds exactly, only the product with the rotation is narrow."""
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
    layer[0].weight.data.copy_(torch.eye(16))
    model = randomize(oftfx.transform(layer, {"all-linear": OFT(16)}), std=0.1).train()
    plain = dense_twin(layer, model)
    x = torch.eye(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x)
    assert rel(got, plain(x).bfloat16()) < 2e-3


def test_gradient_scaling_skips_what_overflows_and_trains_the_rest():
    base = mlp(torch.float32)
    models = [randomize(oftfx.transform(base, {"all-linear": OFT(4)}), std=0.1) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    optimizers = [torch.optim.SGD(oftfx.adapter_parameters(m), lr=0.1) for m in models]
    x = torch.randn(16, 12)
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = model(x).square().mean()
            if model is models[1] and step != 1:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            elif model is models[0]:
                optimizer.zero_grad()
                scaler.scale(loss * (float("inf") if step == 1 else 1)).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
    assert scaler.get_scale() == 2.0**7
    scaled, plain = (skews(m) for m in models)
    assert all(rel(scaled[n], plain[n]) < 1e-6 for n in plain)


@pytest.mark.needs("transformers")
@NARROW
def test_casting_afterwards_equals_casting_before(tiny_llama, ids, dtype):
    """``.to(dtype)`` also narrows the parameters of the rotations, as it does everything; the blocks stay float32."""
    base = tiny_llama()
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.1).to(dtype)
    assert all(p.dtype == dtype for p in model.parameters())
    exact = dense_twin(tiny_llama().to(dtype).double(), model)
    plain = dense_twin(tiny_llama().to(dtype), model)
    allowed = 2.0 * error_of(plain, exact, ids())
    for mode in (True, False):
        assert error_of(model.train(mode), exact, ids()) < allowed
    model.train()(**ids(), labels=ids()["input_ids"]).loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in skews(model).values())
    assert error_of(oftfx.fold(model).model, exact, ids()) < allowed
