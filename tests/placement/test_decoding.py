"""One token, or a few: the sites of one rotation get one product, and what has changed is seen between two of them."""

import copy
import gc

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.placement.find import rotated_sites
from tests.placement.test_group import Overwritten, make, products, ungrouped, zero_some
from tests.reference import randomize, rel


def sites_of(model):
    sites = {p.site: p for _, p in rotated_sites(model)}
    return [sites[f"layers.0.{n}"] for n in "qk"]


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(("spec", "expected"), [(OFT(4), 8), (OFT(4, share_input=True), 4)], ids=["own", "shared"])
def test_a_shared_rotation_makes_one_product_a_token(monkeypatch, spec, expected, tokens):
    model, x = make(spec).eval(), torch.randn(tokens, 20)
    with torch.no_grad():
        right = ungrouped(model, x)
        for _ in range(3):
            counts, y = products(monkeypatch, lambda: model(x))
            assert rel(y, right) < 1e-6
    assert counts == {"rotate": expected, "rotate_jointly": 0, "cayley": 0}


@pytest.mark.parametrize("change", ["step", "data", "input", "result", "mode"])
@torch.no_grad()
def test_what_changes_between_two_readers_is_seen(change):
    model, x = make(OFT(4, share_input=True)).eval(), torch.randn(1, 20)
    q, k = sites_of(model)
    q.rotate(x)  # the blocks are made
    y = q.rotate(x)
    assert k.rotate(x) is y
    skews = list(oftfx.adapter_parameters(model))
    if change == "step":
        optimizer = torch.optim.AdamW(skews, lr=0.1, fused=True)
        for skew in skews:
            skew.grad = torch.randn_like(skew)
        optimizer.step()
    elif change == "data":
        for skew in skews:
            skew.data.mul_(2)
    elif change == "input":
        x.add_(1)
    elif change == "result":
        y.zero_()
    else:
        model.train()
    got = k.rotate(x)
    assert got is not y
    assert rel(got, x.double() @ torch.block_diag(*k.in_effect()[0].matrices().double())) < 1e-6


@torch.no_grad()
def test_nothing_outlives_the_token_and_copies_have_their_own():
    model, x = make(OFT(4, share_input=True)).eval(), torch.randn(1, 20)
    q, k = sites_of(model)
    q.rotate(x)
    q.rotate(x)
    assert q.group._last is not None
    other = copy.deepcopy(model)
    twin = sites_of(other)
    assert twin[0].group._last is None
    randomize(other, std=0.3, seed=5)
    assert rel(twin[1].rotate(x), k.rotate(x)) > 1e-2
    del x
    gc.collect()
    assert q.group._last is None


def test_a_token_that_is_written_to_between_two_readers():
    x = torch.randn(1, 20)
    model = torch.nn.Sequential(Overwritten(zero_some)).eval()
    model = randomize(oftfx.transform(model, {"*": OFT(4, share_input=True)}, example_inputs=(x,)), std=0.2)
    with torch.no_grad():
        expected = ungrouped(model, x)
        for _ in range(3):
            assert rel(model(x), expected) < 1e-6
    with torch.inference_mode():  # such a tensor has no version, so nothing is handed out
        assert rel(model(x.clone()), expected) < 1e-6
        assert rel(model(x), expected) < 1e-6


def test_gradients_are_nobody_elses():
    model, x = make(OFT(4, share_input=True)).eval(), torch.randn(1, 20)
    q, k = sites_of(model)
    with torch.no_grad():
        q.rotate(x)
        q.rotate(x)
    y = k.rotate(x)
    assert y.requires_grad
    with torch.no_grad():
        assert not q.rotate(x).requires_grad
