"""What only a GPU can show; skipped without one. No time is asserted."""

import pytest
import torch

from oftfx.grids import Grid, Partition, compensated
from oftfx.grids.compensate import _in_torch
from oftfx.grids.triton import choose
from tests.grids.triton.blocks import GRIDS, block, moved
from tests.reference import rel

pytestmark = [
    pytest.mark.needs("triton"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels run on a CUDA device only"),
]


@pytest.mark.parametrize("shape", [(64, 1000), (33, 7), (1, 1), (20, 4097)])
@pytest.mark.parametrize("kind", GRIDS)
def test_codes_and_errors_are_torchs(kind, shape):
    from oftfx.grids.triton.columns import rounded

    operands = [None if t is None else t.cuda() for t in block(GRIDS[kind], *shape)]
    grid = moved(GRIDS[kind], "cuda")
    before = operands[0].clone()
    choose.check(lambda: _in_torch(grid, before.clone(), *operands[1:]), lambda: rounded(grid, *operands), [])
    assert torch.equal(operands[0], before)
    again = rounded(grid, *operands), rounded(grid, *operands)
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "integer zeros"])
def test_calibrate_holds_the_kernel_once_and_takes_it(kind, monkeypatch):
    calls, whole = [], choose.is_faster
    monkeypatch.setattr(choose, "is_faster", lambda *a: calls.append(a[3]) or whole(*a))
    for name, value in {"SETTING": "auto", "_DECIDED": {}}.items():
        monkeypatch.setattr(choose, name, value)
    grid = Grid(Partition.tiles((300, 256), (1, 64)), GRIDS[kind].levels, GRIDS[kind].zero)
    weight, inputs = torch.randn(300, 256) * 0.05, torch.randn(1000, 256)
    moments = inputs.T @ inputs
    got = compensated(moved(grid, "cuda"), weight.cuda(), moments.cuda())
    assert len(calls) == 1
    expected = compensated(grid, weight, moments)
    exact = inputs.double() @ weight.double().T
    values = moved(grid, "cuda").values(got).cpu(), grid.values(expected)
    errors = [rel(inputs.double() @ v.double().T, exact) for v in values]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
