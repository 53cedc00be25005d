"""Rotations and folds multiply float32 exactly, whatever torch was told of other products."""

import threading

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import oftfx
from oftfx import OFT
from oftfx.rotation.cayley import cayley
from oftfx.rotation.ieee import ieee_products
from oftfx.rotation.rotate import rotate_weight

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_linalg_solve_ex")


class Products(TorchDispatchMode):
    """Notes how each product would be made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if any(name == p or name == f"{p}_" for p in PRODUCTS):
            self.seen.add(torch.get_float32_matmul_precision())
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")


def settings():
    new = [getattr(b, "fp32_precision", None) for b in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
    return torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, new


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
@pytest.mark.parametrize("what", ["cayley", "cayley_neumann", "weight", "fold", "forward"])
def test_what_has_to_be_exact_is(what, chosen):
    model = oftfx.transform(nn.Sequential(nn.Linear(12, 10)), {"*": OFT(4, init="normal")})
    skew = torch.randn(3, 6)
    torch.set_float32_matmul_precision(chosen)
    before = settings()
    with Products() as products:
        if what in ("cayley", "cayley_neumann"):
            cayley(skew, 4, what)
        elif what == "weight":
            rotate_weight(torch.randn(10, 12), torch.randn(3, 4, 4))
        elif what == "fold":
            oftfx.fold(model)
        else:
            model.eval()(torch.randn(5, 12))
    assert settings() == before
    expected = {"highest", chosen} if what == "forward" else {"highest"}  # the model's own products are as chosen
    assert products.seen == expected


def test_a_choice_by_the_newer_attributes_comes_back():
    backend = torch.backends.cuda.matmul
    if not hasattr(backend, "fp32_precision"):
        pytest.skip("torch before 2.9 has none")
    backend.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with ieee_products():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = "none"


def test_threads_and_errors_leave_the_choice_as_it_was():
    torch.set_float32_matmul_precision("high")
    before, seen, inside = settings(), [], threading.Barrier(4)

    def one(fails):
        try:
            with ieee_products():
                inside.wait()
                seen.append(torch.get_float32_matmul_precision())
                if fails:
                    raise ValueError
        except ValueError:
            pass

    threads = [threading.Thread(target=one, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["highest"] * 4
    assert settings() == before


def test_cayley_of_a_skew_that_is_not_finite_is_not_finite():
    """No device is asked whether a solution exists: it does, for all numbers; what is none shows in the result."""
    skew = torch.randn(3, 6)
    skew[1, 2] = torch.nan
    blocks = cayley(skew, 4, "cayley")
    assert not blocks[1].isfinite().all()
    assert torch.equal(blocks[[0, 2]], cayley(skew[[0, 2]], 4, "cayley"))
