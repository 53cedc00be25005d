"""What a step keeps for backward of weights that are rotated where they are read: the weight and the blocks."""

import threading
from collections import Counter

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import OFT
from oftfx.placement import weight as placed
from oftfx.placement.find import rotated_sites
from tests.reference import randomize, rel


class Both(torch.autograd.Function):
    """A product by somebody's own function, which keeps both operands."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


class Reads(nn.Module):
    """Weights that are read in many ways, by one module."""

    def __init__(self):
        super().__init__()
        self.plain, self.turned = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 6))
        self.theirs = nn.Linear(6, 6)

    def forward(self, x):
        y = F.linear(x, self.plain).tanh()
        y = torch.vmap(lambda row: row * 2)(y) @ self.turned.t()
        return {"y": [Both.apply(y, self.theirs.weight).relu()]}


CONVOLUTION = {"padding_mode": "circular", "padding": 1, "bias": False}
MODELS = {
    "conv1d": lambda: (nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 2)), torch.randn(2, 6, 9)),
    "conv2d": lambda: (nn.Sequential(nn.Conv2d(6, 9, 3, groups=3, **CONVOLUTION)), torch.randn(2, 6, 5, 7)),
    "channels_last": lambda: (
        nn.Sequential(nn.Conv2d(6, 9, (3, 1))).to(memory_format=torch.channels_last),
        torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last),
    ),
    "attention": lambda: (
        nn.TransformerEncoderLayer(12, 2, 18, dropout=0.0, batch_first=True),
        torch.randn(2, 5, 12),
    ),
    "reads": lambda: (Reads(), torch.randn(5, 8)),
}
DTYPES = [torch.float32, torch.bfloat16]


def model_of(kind, dtype=torch.float32, block=2, **spec):
    torch.manual_seed(3)
    base, x = MODELS[kind]()
    x = x.to(dtype).requires_grad_()
    base = base.to(dtype).requires_grad_(False)
    return randomize(oftfx.transform(base, {"*": OFT(block, **spec)}, example_inputs=(x,)).train(), std=0.2), x


def loss_of(model, x):
    y = model(x)
    y = y["y"][0] if isinstance(y, dict) else y
    return y.float().square().sum()


def leaves(model, x):
    return [x, *oftfx.adapter_parameters(model)]


@pytest.fixture
def lent(monkeypatch):
    """The memory of each weight that was lent."""
    found = []
    whole = placed.RotateWeight.acting

    def acting(self, module):
        weight = whole(self, module)
        if weight is not None:
            found.append(StorageWeakRef(weight.untyped_storage()))
        return weight

    monkeypatch.setattr(placed.RotateWeight, "acting", acting)
    return found


@pytest.fixture
def kept(monkeypatch):
    """Let readers keep what was lent, as torch does."""

    def keep(does):
        monkeypatch.setattr(placed, "keep_recipes", (lambda *_: None) if does else WHOLE)

    return keep


WHOLE = placed.keep_recipes


def saved_bytes(loss):
    """Of what the graph keeps, one storage once; whatever is a leaf that stands in the model is not counted."""
    nodes, seen, found = [loss.grad_fn], set(), {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(n for n, _ in node.next_functions)
        for name in (n for n in dir(node) if n.startswith("_raw_saved_")):
            saved = getattr(node, name)
            for one in saved if isinstance(saved, tuple | list) else (saved,):
                if isinstance(one.data, torch.Tensor) and not isinstance(one.data, nn.Parameter):
                    found[one.data.untyped_storage().data_ptr()] = one.data.untyped_storage().nbytes()
    return sum(found.values())


class Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_rotated_weight_is_gone_and_gradients_are_the_same_to_the_bit(kind, dtype, lent, kept):
    model, x = model_of(kind, dtype)
    found, products = [], []
    for keeps in (True, False):
        kept(keeps)
        lent.clear()
        loss = loss_of(model, x)
        assert len(lent) == sum(p.kind == "weight" for _, p in rotated_sites(model)) > 0
        assert [ref.expired() for ref in lent] == [not keeps] * len(lent)
        with Counts() as counts:
            found.append(torch.autograd.grad(loss, leaves(model, x)))
        products.append({n: c for n, c in counts.of.items() if "mm" in n or "conv" in n or "_to_copy" in n})
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert products[0] == products[1]  # it is made again once, as ever


def test_bytes():
    base = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3)).requires_grad_(False)
    model = randomize(oftfx.transform(base, {"*": OFT(4)}).train())
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    blocks = (36 + 144) // 4 * 16 * 4  # float32
    between = 2 * 16 * 7 * 7 * 4
    last = 2 * 16 * 5 * 5 * 4
    skews = sum(p.numel() * 4 for p in oftfx.adapter_parameters(model))
    saved = saved_bytes(model(x).square().sum())
    assert saved >= blocks + between + last
    assert saved <= blocks + between + last + x.numel() * 4 + 2 * skews + 1000
    assert 2 * skews + 1000 < 16 * 16 * 9 * 4  # either weight would show


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "attention"])
def test_under_autocast_the_cast_is_gone_too(kind, kept):
    model, x = model_of(kind)
    found, saved = [], []
    for keeps in (True, False):
        kept(keeps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x)
        saved.append(saved_bytes(loss))
        found.append(torch.autograd.grad(loss, leaves(model, x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    weights = [p.module._parameters[p.parameter] for _, p in rotated_sites(model) if p.kind == "weight"]
    assert saved[0] - saved[1] == sum(2 * w.numel() for w in weights)  # bfloat16


@pytest.mark.parametrize("written", ["weight", "skew", "block"])
def test_what_was_written_to_since_is_an_error_as_torchs_own_is(written):
    model, x = model_of("conv1d")
    loss = loss_of(model, x)
    placement = next(p for _, p in rotated_sites(model) if p.kind == "weight")
    with torch.no_grad():
        if written == "weight":
            placement.module._parameters["weight"].add_(1)
        elif written == "skew":
            placement.rotations["default"].skew.add_(1)
        else:
            node = loss.grad_fn
            while not hasattr(node, "ahead"):
                node = node.next_functions[-1 if "Conv" not in node.name() else 1][0]
            node.saved_tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: .torch.FloatTensor.*is at version"):
        torch.autograd.grad(loss, x if written != "skew" else leaves(model, x))


def test_a_weight_that_the_reader_writes_to_is_left_to_torch():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            y = F.linear(x, self.w)
            if x.requires_grad:
                self.w.mul_(2)
            return y

    x = torch.randn(3, 6, dtype=torch.bfloat16)
    model = oftfx.transform(Writes().bfloat16().requires_grad_(False), {"*": OFT(2)}, example_inputs=(x,)).train()
    assert [p.kind for _, p in rotated_sites(model)] == ["weight"]
    loss = loss_of(model, x.requires_grad_())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def attention(q, k, v, *_, **__):
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_gradients(kind, kept, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)  # torch's on a CPU has no second gradient
    model, x = model_of(kind)
    found = []
    for keeps in (True, False):
        kept(keeps)
        first = torch.autograd.grad(loss_of(model, x), leaves(model, x), create_graph=True)
        found.append(torch.autograd.grad(sum(g.sin().sum() for g in first), leaves(model, x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_graph_can_be_used_again_and_in_part():
    model, x = model_of("attention")
    loss = loss_of(model, x)
    every = torch.autograd.grad(loss, leaves(model, x), retain_graph=True)
    for some in ([0], [1], [0, 2], range(len(every))):
        asked = [leaves(model, x)[i] for i in some]
        got = torch.autograd.grad(loss, asked, retain_graph=True)
        assert all(torch.equal(a, every[i]) for a, i in zip(got, some, strict=True))
    with torch.no_grad():
        x.mul_(1)
        next(p for _, p in rotated_sites(model) if p.kind == "weight").module.in_proj_weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(loss, leaves(model, x))


def test_threads_go_back_through_one_graph(kept):
    model, x = model_of("attention")
    kept(True)
    expected = torch.autograd.grad(loss_of(model, x), leaves(model, x))
    kept(False)
    loss, found = loss_of(model, x), []
    start = threading.Barrier(6)

    def one():
        start.wait()
        found.extend(torch.autograd.grad(loss, leaves(model, x), retain_graph=True) for _ in range(5))

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert all(torch.equal(a, b) for got in found for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["conv2d", "attention"])
def test_gradient_checkpointing_around_the_reader(kind, reentrant, lent):
    model, x = model_of(kind, dropout=0.4)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        loss = loss_of(run, x)
        assert all(ref.expired() for ref in lent)
        loss.backward()
        found.append([p.grad.clone() for p in leaves(model, x)])
        model.zero_grad()
        x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_checkpoint_and_hooks_inside_the_reader_see_what_they_saw():
    seen = []

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(6, 6)) for _ in range(3))

        def forward(self, x):
            with saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
                x = F.linear(x, self.a)
            return F.linear(checkpoint(lambda x: F.linear(x, self.b).sin(), x, use_reentrant=False), self.c)

    base, x = Reader().requires_grad_(False), torch.randn(5, 6, requires_grad=True)
    model = randomize(oftfx.transform(base, {"*": OFT(3)}, example_inputs=(x,)).train(), std=0.2)
    assert [p.kind for _, p in rotated_sites(model)] == ["weight"] * 3
    seen.clear()
    got = torch.autograd.grad(loss_of(model, x), leaves(model, x))
    assert sorted(map(tuple, seen)) == [(5, 6), (6, 6)]
    wide = x.detach().double().requires_grad_()
    double = oftfx.transform(base.double(), {"*": OFT(3)}, example_inputs=(wide,)).train()
    randomize(double, std=0.2)
    expected = torch.autograd.grad(loss_of(double, wide), leaves(double, wide))
    assert all(rel(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))


def test_hooks_of_the_user_see_what_is_saved(kept, lent):
    model, x = model_of("conv1d")
    expected = torch.autograd.grad(loss_of(model, x), leaves(model, x))
    with save_on_cpu():
        loss = loss_of(model, x)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves(model, x)), expected, strict=True))
    seen = []
    with saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        loss = loss_of(model, x)
    assert sum(tuple(t.shape) == (8, 6, 3) and t.requires_grad for t in seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves(model, x)), expected, strict=True))


def test_weights_of_one_reader_are_looked_for_once(monkeypatch, lent):
    calls = []
    monkeypatch.setattr(placed, "keep_recipes", lambda lent, *rest: calls.append(len(lent)) or WHOLE(lent, *rest))
    model, x = model_of("reads")
    calls.clear()
    loss_of(model, x)
    assert sorted(calls) == [0, 0, 3]


def test_nodes_before_the_reader_are_not_looked_at(monkeypatch):
    from oftfx.placement import unsaved

    seen, whole = [], unsaved.saved_by
    monkeypatch.setattr(unsaved, "saved_by", lambda node: seen.append(node.name()) or whole(node))
    model, x = model_of("conv2d")
    for _ in range(30):
        x = x.sin()
    model(x)
    assert "SinBackward0" not in seen
    assert "ConvolutionBackward0" in seen
    assert len(seen) < 13


def test_a_reader_that_fails_leaves_nothing(lent):
    model, x = model_of("conv1d")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 7, 9))
    assert all(ref.expired() for ref in lent)
    lent.clear()
    loss_of(model, x).backward()
    assert x.grad is not None
