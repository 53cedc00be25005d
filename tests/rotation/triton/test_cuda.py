"""What only a GPU can show; skipped without one. No time is asserted."""

import threading

import pytest
import torch

from oftfx.rotation import cayley, rotate, skew_size
from oftfx.rotation.cayley import _in_torch
from oftfx.rotation.rotate import _jointly_in_torch, rotate_jointly
from oftfx.rotation.triton import choose
from tests.reference import rel
from tests.rotation.triton.dense import dense_products, dense_series

pytestmark = [
    pytest.mark.needs("triton"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels run on a CUDA device only"),
]


@pytest.fixture
def auto(monkeypatch):
    """As in a fresh process where nothing was set; gives the calls that measured."""
    calls, whole = [], choose.is_faster
    monkeypatch.setattr(choose, "is_faster", lambda *a: calls.append(a[3]) or whole(*a))
    for name, value in {"SETTING": "auto", "_DECIDED": {}, "_ALWAYS": {}}.items():
        monkeypatch.setattr(choose, name, value)
    return calls


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 5e-7), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)], ids=str
)
@pytest.mark.parametrize(
    "shape", [(5, 3, 2, 1), (1000, 40, 3, 2), (1, 5, 7, 3), (513, 128, 32, 2), (4097, 3, 48, 1), (300, 2, 256, 2)]
)
def test_products_equal_dense_algebra(shape, dtype, bound):
    from oftfx.rotation.triton import rotate as operators

    rows, groups, size, count = shape
    x = torch.randn(rows, groups * size, device="cuda").to(dtype).requires_grad_()
    blocks = (torch.randn(groups, size, count * size, device="cuda") / size**0.5).to(dtype).requires_grad_()
    of_outputs = [torch.randn_like(x) for _ in range(count)]
    found = []
    for function, leaves in (
        (operators.rotate_jointly, (x, blocks)),
        (dense_products, [t.detach().double().requires_grad_() for t in (x, blocks)]),
    ):
        outputs = function(*leaves)
        found.append(
            [
                *outputs,
                *torch.autograd.grad(
                    outputs, leaves, [g.to(y.dtype) for g, y in zip(of_outputs, outputs, strict=True)]
                ),
            ]
        )
    assert all(rel(a, b) < bound for a, b in zip(*found, strict=True))
    again = operators.rotate_jointly(x, blocks)
    assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=False))
    assert torch.equal(torch.autograd.grad(again, blocks, of_outputs)[0], found[0][-1])


@pytest.mark.parametrize("size", [2, 3, 7, 16, 27, 32])
def test_series_equal_explicit_powers(size):
    from oftfx.rotation.triton import cayley as operators

    skew = (torch.randn(5, skew_size(size)) * 0.3 / size**0.5).requires_grad_()
    there = skew.detach().cuda().requires_grad_()
    of_blocks = torch.randn(5, size, size)
    blocks = operators.cayley_series(there, size, 3, True)
    (got,) = torch.autograd.grad(blocks, there, of_blocks.cuda())
    wide = skew.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(_in_torch(size, (3, True), None, wide), wide, of_blocks.double())
    assert rel(blocks.cpu(), dense_series(skew, size, 3, True)) < 5e-7
    assert rel(got.cpu(), expected) < 1e-6


def test_the_choice_is_kept(auto):
    x, blocks = torch.randn(64, 96, device="cuda"), torch.randn(3, 32, 64, device="cuda")
    for _ in range(3):
        rotate(x, blocks[:, :, :32])
        rotate_jointly(x, blocks)
        cayley(torch.zeros(3, skew_size(32), device="cuda"), 32)
    assert len(auto) == len(choose._DECIDED) == 3
    threads = [threading.Thread(target=rotate, args=(x[:7], blocks[:, :, :32])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(auto) == 4


def test_checkpointing_does_not_see_the_measurement(auto):
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(64, 96, device="cuda", requires_grad=True)
    blocks = torch.randn(3, 32, 32, device="cuda", requires_grad=True)
    checkpoint(rotate, x, blocks, use_reentrant=False).sum().backward()
    assert rel(x.grad, torch.ones_like(x).double() @ torch.block_diag(*blocks.detach().double()).T) < 1e-6
    assert len(auto) == 1


@pytest.mark.parametrize("before", [False, True])
def test_a_graph_is_captured_without_a_measurement(before, auto):
    x, blocks = torch.randn(64, 96, device="cuda"), torch.randn(3, 32, 64, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # torch's own product needs its workspace
        rotate_jointly(x, blocks) if before else _jointly_in_torch(x, blocks)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rotate_jointly(x, blocks)
    x.normal_()
    graph.replay()
    assert all(rel(a, b) < 1e-2 for a, b in zip(got, dense_products(x, blocks), strict=True))
    assert len(auto) == int(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_than_the_current_one():
    from oftfx.rotation.triton import rotate as operators

    x, blocks = torch.randn(64, 96, device="cuda:1"), torch.randn(3, 32, 32, device="cuda:1")
    assert rel(operators.rotate(x, blocks), dense_products(x, blocks)[0]) < 5e-7
