import json
import math

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError
from tests.blending.test_blend import at, dense, made, nearest


@pytest.mark.parametrize(
    "spec",
    [OFT(3), OFT(12, parameterization="cayley"), OFT(4, block_share=True), OFT(1), OFT(3, coft_eps=0.2)],
    ids=str,
)
def test_angles_are_those_of_the_eigenvalues(spec):
    model = made(spec)
    report = oftfx.rotation_angles(model, "a")
    assert [s.fqn for s in report] == ["0", "2"]
    for site in report:
        r, size = dense(at(model, site.fqn, "a")), spec.block_size
        assert (site.blocks, site.block_size) == (12 // size, size)
        for index, got in enumerate(site.angles):
            block = r[index * size : (index + 1) * size, index * size : (index + 1) * size]
            expected = torch.linalg.eigvals(nearest(block)).angle().abs().sort().values
            assert (torch.tensor(got, dtype=torch.float64) - expected).abs().max() < 1e-7  # arccos-like near zero
        assert abs(site.departure - float((torch.linalg.svdvals(r) - 1).abs().max())) < 1e-13
        flat = [a for block in site.angles for a in block]
        assert site.largest == max(flat)
        assert abs(site.norm - math.sqrt(sum(a * a for a in flat))) < 1e-15
        assert abs(site.rms * math.sqrt(12) - site.norm) < 1e-15


def test_small_angles_keep_their_digits():
    model = made(OFT(2, parameterization="cayley"))
    with torch.no_grad():
        model[0].oft.a.skew.fill_(1e-9)
    assert all(abs(a - 2e-9) < 1e-16 for block in oftfx.rotation_angles(model, "a")["0"].angles for a in block)


@pytest.mark.needs("transformers")
def test_sites_that_share_say_so(tiny_llama, ids):
    model = oftfx.transform(tiny_llama(), {"*.[qk]_proj": OFT(8, share_input=True)}, example_inputs=ids())
    report = oftfx.rotation_angles(model)
    assert [(s.fqn[-6:], s.owner[-6:]) for s in report][:2] == [("q_proj", "q_proj"), ("k_proj", "q_proj")]
    data = json.loads(report.to_json())
    assert len(data["sites"]) == 4
    assert "largest" in report.table()
    with pytest.raises(KeyError):
        report["nothing"]


def test_an_unknown_adapter():
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        oftfx.rotation_angles(made(OFT(3)), "x")
    with pytest.raises(AdapterError, match="has no adapters"):
        oftfx.rotation_angles(nn.Linear(3, 3))
