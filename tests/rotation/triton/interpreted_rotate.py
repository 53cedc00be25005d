"""Triton's products in its interpreter; test_interpreted.py runs this file in a process of its own."""

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.rotation import cayley, rotate, rotate_weight
from oftfx.rotation.rotate import _in_torch, _jointly_in_torch, rotate_jointly
from oftfx.rotation.triton import choose
from oftfx.rotation.triton import rotate as operators
from tests.reference import rel
from tests.rotation.triton.dense import dense_products

# rows, blocks, block size, outputs: sizes of all kinds, several blocks in a tile, a block in several tiles, one row,
# more rows than a tile has, and rows that are summed in several runs.
SHAPES = [
    (5, 3, 2, 1),
    (66, 40, 3, 2),
    (1, 5, 7, 3),
    (33, 2, 27, 1),
    (17, 3, 32, 2),
    (65, 2, 48, 2),
    (3, 2, 80, 1),
    (1100, 2, 4, 1),
]
# The interpreter cuts a float32 down to bfloat16 where a GPU rounds, so its bound is a whole last bit.
BOUNDS = {torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 5e-3}


def operands(rows, groups, size, count, dtype=torch.float32):
    x = torch.randn(rows, groups * size).to(dtype).requires_grad_()
    return x, (torch.randn(groups, size, count * size) / size**0.5).to(dtype).requires_grad_()


def gradients(function, operands, of_outputs):
    outputs = function(*operands)
    return outputs, torch.autograd.grad(outputs, operands, of_outputs)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_equal_dense_algebra_and_torchs_operators(shape, dtype):
    x, blocks = operands(*shape, dtype)
    of_outputs = [torch.randn_like(x) for _ in range(shape[3])]
    got, of_operands = gradients(operators.rotate_jointly, (x, blocks), of_outputs)
    wide = [t.detach().double().requires_grad_() for t in (x, blocks)]
    dense, of_wide = gradients(dense_products, wide, [g.double() for g in of_outputs])
    eager, of_eager = gradients(_jointly_in_torch, (x, blocks), of_outputs)
    assert all(y.dtype == dtype and y.shape == x.shape and y.is_contiguous() for y in got)
    assert [g.dtype for g in of_operands] == [dtype] * 2
    for a, b, c in zip([*got, *of_operands], [*dense, *of_wide], [*eager, *of_eager], strict=True):
        assert rel(a, b) < BOUNDS[dtype]
        assert rel(a, c) < 4 * BOUNDS[dtype]  # torch's sums over many rows are the less exact ones


def test_no_rows():
    x, blocks = operands(0, 3, 5, 2)
    got, of_operands = gradients(operators.rotate_jointly, (x, blocks), [torch.zeros_like(x)] * 2)
    assert [y.shape for y in got] == [x.shape] * 2
    assert of_operands[0].shape == x.shape
    assert torch.equal(of_operands[1], torch.zeros_like(blocks))


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "permuted", "vector"])
def test_operands_of_any_strides(kind):
    x = {
        "transposed": torch.randn(12, 5).T,
        "sliced": torch.randn(5, 30)[::2, 3:27:2],
        "expanded": torch.randn(1, 3, 12).expand(4, 3, 12),
        "permuted": torch.randn(12, 5, 2).permute(2, 1, 0),
        "vector": torch.randn(12),
    }[kind].requires_grad_()
    blocks = torch.randn(1, 4, 8).mT.reshape(1, 4, 8).expand(3, 4, 8)  # as `block_share` has them
    turned = torch.randn(3, 4, 4).mT
    for r in (blocks, turned):
        got, (of_x,) = gradients(lambda x, r=r: operators.rotate_jointly(x, r), (x,), [x.detach()] * (r.shape[2] // 4))
        for y, expected in zip(got, dense_products(x, r), strict=True):
            assert rel(y, expected) < 3e-7
        wide = x.detach().double().requires_grad_()
        _, (expected,) = gradients(lambda x, r=r: dense_products(x, r), (wide,), [wide.detach()] * len(got))
        assert rel(of_x, expected) < 3e-7


def test_gradients_of_gradients():
    first = operands(3, 3, 5, 2)
    second = [t.detach().double().requires_grad_() for t in first]
    found = []
    for function, leaves in ((operators.rotate_jointly, first), (dense_products, second)):
        loss = sum((y**3).sum() for y in function(*leaves))
        of_leaves = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.sin().sum() for g in of_leaves), leaves))
    for got, expected in zip(*found, strict=True):
        assert rel(got, expected) < 1e-5


def test_a_sum_over_rows_is_the_same_to_the_bit_each_time():
    x, _ = operands(1100, 2, 4, 1)
    y = torch.randn_like(x)
    first, *more = [operators.outer(x, [y], 4, torch.float32) for _ in range(3)]
    assert all(torch.equal(first, m) for m in more)
    assert operators.splits(1100, 1) > 1


def test_blocks_in_float32_turn_half_precision_and_learn_in_float32():
    x, _ = operands(33, 3, 5, 1, torch.bfloat16)
    blocks = torch.randn(3, 5, 5, requires_grad=True)
    (y,), (of_x, of_blocks) = gradients(operators.rotate_jointly, (x, blocks), [torch.randn_like(x)])
    assert (y.dtype, of_x.dtype, of_blocks.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert rel(y, dense_products(x, blocks)[0]) < 1e-2


def test_an_operand_without_gradient_keeps_nothing():
    x, blocks = operands(4, 3, 5, 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        operators.rotate(x, blocks.detach())
        operators.rotate(x.detach(), blocks)
    assert kept == [blocks.shape, x.shape]


@pytest.mark.parametrize("name", ["spread", "gather", "outer"])
def test_operators_keep_torchs_rules(name):
    x, blocks = operands(4, 3, 5, 2)
    ys = [torch.randn_like(x, requires_grad=True) for _ in range(2)]
    given = {"spread": (x, blocks), "gather": (ys, blocks), "outer": (x, ys, 5, torch.float32)}[name]
    torch.library.opcheck(getattr(operators, name), given)


def test_rotations_take_the_operator_where_they_are_told_to(monkeypatch):
    x, blocks = operands(6, 3, 5, 2)
    seen = []
    monkeypatch.setattr(operators, "rotate", lambda *_: seen.append("one") or _[0])
    monkeypatch.setattr(operators, "rotate_jointly", lambda *_: seen.append("several") or _[:1])
    rotate(x, blocks[:, :, :5])
    rotate_jointly(x, blocks)
    assert seen == ["one", "several"]
    rotate_weight(x, blocks[:, :, :5])  # folds do not hang on a timing
    rotate(x[:1], blocks[:, :, :5])  # one token
    rotate(x.double(), blocks[:, :, :5])
    assert len(seen) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic):
    def function(x, skew):
        blocks = cayley(skew, 5)
        first, second = rotate_jointly(x, torch.cat([blocks, blocks.mT], dim=2))
        return rotate(first, blocks.mT) * second

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    skew = (torch.randn(3, 10) * 0.1).requires_grad_()
    for rows in (4, 7):
        x = torch.randn(rows, 15, requires_grad=True)
        (got,), of_got = gradients(lambda *t: [compiled(*t)], (x, skew), [torch.ones_like(x)])
        (expected,), of_expected = gradients(lambda *t: [function(*t)], (x, skew), [torch.ones_like(x)])
        assert torch.equal(got, expected)
        assert all(torch.equal(a, b) for a, b in zip(of_got, of_expected, strict=True))


def test_what_is_compiled_takes_what_was_faster_whenever_it_was_timed(monkeypatch):
    for name, value in {"SETTING": "auto", "_DECIDED": {}, "_ALWAYS": {}}.items():
        monkeypatch.setattr(choose, name, value)
    x, blocks = operands(6, 3, 5, 1)
    targets = []

    def backend(graph, _):
        targets.append([str(n.target) for n in graph.graph.nodes if "oftfx" in str(n.target)])
        return graph

    compiled = torch.compile(lambda x, r: rotate(x, r), backend=backend, fullgraph=True, dynamic=True)
    for rows, faster in ((6, True), (60, True), (600, False)):
        torch._dynamo.reset()
        compiled(x, blocks)
        monkeypatch.setattr(choose, "is_faster", lambda *_, faster=faster: faster)
        rotate(torch.randn(rows, 15, requires_grad=True), blocks)
    torch._dynamo.reset()
    compiled(x, blocks)
    assert targets == [[], ["oftfx.spread.default"], ["oftfx.spread.default"], []]


def test_autocast_no_grad_and_inference():
    x, blocks = operands(6, 3, 5, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = rotate(x, blocks)
        assert y.dtype == _in_torch(x, blocks).dtype == torch.bfloat16
        y.sum().backward()
    assert (x.grad.dtype, blocks.grad.dtype) == (torch.float32, torch.float32)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = rotate(x, blocks)
        assert not y.requires_grad
        assert rel(y, dense_products(x, blocks)[0]) < 3e-7


def test_transforms_and_exports_are_made_of_torchs_operators():
    x, blocks = operands(4, 3, 5, 1)
    batch = torch.func.vmap(lambda r: rotate(r, blocks))(x.reshape(2, 2, 15))
    assert rel(batch, dense_products(x, blocks)[0].reshape(2, 2, 15)) < 3e-7
    _, along = torch.func.jvp(lambda x: rotate(x, blocks.detach()), (x.detach(),), (x.detach(),))
    assert rel(along, dense_products(x, blocks)[0]) < 3e-7
    rotation = oftfx.Rotation(15, OFT(5))
    for strict in (False, True):
        program = torch.export.export(rotation, (x.detach(),), strict=strict)
        assert not [n for n in program.graph.nodes if "oftfx" in str(n.target)]


def test_a_model_trains_as_it_does_with_torchs_operators(monkeypatch):
    def losses(setting):
        torch.manual_seed(0)
        monkeypatch.setattr(choose, "SETTING", setting)
        layers = {n: torch.nn.Linear(12, 6) for n in ("a", "b")}
        model = oftfx.transform(Pair(layers), {"*": OFT(4, init="normal")})
        optimizer = torch.optim.SGD(oftfx.adapter_parameters(model), lr=0.1)
        found = []
        for x in torch.randn(3, 5, 12):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    assert rel(losses("1"), losses("0")) < 1e-6


class Pair(torch.nn.Module):
    """Two layers that read the same tensor."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleDict(layers)

    def forward(self, x):
        return self.layers["a"](x) * self.layers["b"](x)
