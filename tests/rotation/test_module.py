import copy
import io

import pytest
import torch

from oftfx import OFT, OftfxError
from oftfx.rotation import Rotation
from oftfx.rotation.recipe import Recipe
from tests.reference import dense_rotation, rel


def make(spec=None, n=20, std=0.1, **kwargs):
    rotation = Rotation(n, spec or OFT(5), **kwargs)
    torch.nn.init.normal_(rotation.skew, std=std)
    return rotation


@pytest.mark.parametrize("spec", [OFT(5), OFT(5, parameterization="cayley"), OFT(blocks=2), OFT(4, terms=3), OFT(1)])
def test_forward_equals_the_dense_rotation(spec):
    rotation = make(spec).eval()
    x = torch.randn(3, 20)
    expected = x.double() @ dense_rotation(
        rotation.skew, rotation.block_size, parameterization=spec.parameterization, terms=spec.terms
    )
    assert rel(rotation(x), expected) < 1e-6


def test_block_share_uses_one_block_of_parameters():
    rotation = make(OFT(5, block_share=True)).eval()
    assert rotation.skew.shape == (1, 10)
    x = torch.randn(3, 20)
    assert rel(rotation(x), x.double() @ dense_rotation(rotation.skew, 5, blocks=4)) < 1e-6


def test_eval_mode_computes_the_blocks_once_until_the_parameter_changes(monkeypatch):
    rotation = make().eval()
    calls = []
    original = Recipe.__call__
    monkeypatch.setattr(Recipe, "__call__", lambda self, skew: calls.append(1) or original(self, skew))
    x = torch.randn(3, 20)
    with torch.no_grad():
        first = rotation(x)
        rotation(x)
        assert len(calls) == 1
        rotation.skew.mul_(2)
        second = rotation(x)
        assert len(calls) == 2
        assert not torch.equal(first, second)
        rotation(x.double())
        assert len(calls) == 3  # another dtype
        assert torch.equal(rotation(x), second)
        assert len(calls) == 3  # beside the first
    rotation(x)
    assert len(calls) == 4  # gradients are wanted, so nothing may be cached
    rotation.train()
    with torch.no_grad():
        rotation(x)
        rotation(x)
    assert len(calls) == 6


def test_the_cache_sees_optimiser_steps_loading_and_moves():
    rotation = make().eval()
    x = torch.randn(3, 20)

    def current():
        with torch.no_grad():
            return rel(rotation(x), x.double() @ dense_rotation(rotation.skew, 5))

    assert current() < 1e-6
    optimizer = torch.optim.Adam(rotation.parameters(), lr=0.1)
    rotation(x).sum().backward()
    optimizer.step()
    assert current() < 1e-6
    rotation.load_state_dict({"skew": torch.randn(4, 10) * 0.1})
    assert current() < 1e-6
    rotation.double().float()
    assert current() < 1e-6
    rotation.train()
    rotation.skew.data.mul_(0.5)  # invisible to torch, but in training mode
    rotation.eval()
    assert current() < 1e-6


def test_a_cache_made_in_inference_mode_can_be_trained_through_later():
    rotation = make().eval()
    with torch.inference_mode():
        rotation(torch.randn(3, 20))
    x = torch.randn(3, 20, requires_grad=True)
    rotation.skew.requires_grad_(False)
    rotation(x).sum().backward()
    assert x.grad is not None


def test_dropout_replaces_whole_blocks_and_draws_anew():
    rotation = make(OFT(5, dropout=0.5), n=1000, std=0.3)
    x = torch.randn(4, 1000)
    full = rotation.eval()(x).view(4, 200, 5)
    rotation.train()
    kept = []
    for _ in range(2):
        out = rotation(x).view(4, 200, 5)
        same = (out - full).abs().amax(dim=(0, 2)) < 1e-5
        untouched = (out - x.view(4, 200, 5)).abs().amax(dim=(0, 2)) < 1e-5
        assert bool((same ^ untouched).all())  # each block is either its rotation or the identity
        kept.append(same)
    assert 60 < int(kept[0].sum()) < 140
    assert not torch.equal(*kept)


def test_dropped_blocks_get_no_gradient():
    rotation = make(OFT(5, dropout=0.5), n=100)
    rotation(torch.randn(4, 100)).square().sum().backward()
    per_block = rotation.skew.grad.abs().sum(1)
    assert 0 < int((per_block == 0).sum()) < 20


def test_coft_bounds_the_rotation_and_a_forward_never_writes_the_parameter():
    rotation = make(OFT(5, coft_eps=0.2), std=1.0)
    before = rotation.skew.detach().clone()
    x = torch.randn(3, 20)
    out = rotation.train()(x)
    with torch.no_grad():
        rotation.eval()(x)
    assert torch.equal(rotation.skew, before)
    limit = 0.2 / 4**0.5
    norms = (2 * before.double().square().sum(1)).sqrt()
    clipped = before.double() * (limit / norms).clamp(max=1)[:, None]
    assert rel(out, x.double() @ dense_rotation(clipped, 5)) < 1e-6
    rotation.project_()
    assert rel(rotation.skew, clipped) < 1e-6
    assert rel(rotation(x), out) < 1e-6


def test_the_skew_starts_at_zero_or_normal():
    assert not Rotation(20, OFT(5)).skew.any()
    assert 0.05 < Rotation(2000, OFT(20, init="normal")).skew.detach().std().item() < 0.15


def test_an_indivisible_size_lists_the_divisors():
    with pytest.raises(
        OftfxError,
        match=r"here: block_size 32 does not divide in_features 50\. Divisors: 1, 2, 5, 10, 25, 50",
    ):
        Rotation(50, OFT(32), where="here")


def test_copies_are_independent_and_pickles_carry_no_cache():
    rotation = make().eval()
    x = torch.randn(3, 20)
    with torch.no_grad():
        expected = rotation(x)
    twin = copy.deepcopy(rotation)
    with torch.no_grad():
        twin.skew.zero_()
        assert torch.equal(twin(x), x)
        assert torch.equal(rotation(x), expected)
    buffer = io.BytesIO()
    torch.save(rotation, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert again._kept is None
    assert again._source is None
    with torch.no_grad():
        assert torch.equal(again(x), expected)
