"""Sites that read the same tensor: one evaluation a forward, the same numbers as each for itself."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import OftfxWarning
from oftfx.folding.record import Undo
from oftfx.passes import FreezeRotations
from oftfx.placement.find import rotated_sites
from oftfx.placement.handout import HandOut
from oftfx.planning.program import Program
from tests.reference import dense_rotation, randomize, rel


class Block(nn.Module):
    """Three layers that read one tensor, which the block itself makes, and one that reads another."""

    def __init__(self, n=20):
        super().__init__()
        self.norm = nn.LayerNorm(n)
        self.q, self.k, self.v = nn.Linear(n, 8), nn.Linear(n, 6), nn.Linear(n, 10)
        self.o = nn.Linear(24, n)

    def forward(self, x):
        y = self.norm(x)
        return x + self.o(torch.cat([self.q(y), self.k(y), self.v(y)], dim=-1))


class Net(nn.Module):
    def __init__(self, checkpoint=None):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.checkpoint = checkpoint

    def forward(self, x):
        for layer in self.layers:
            if self.checkpoint is None:
                x = layer(x)
            else:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.checkpoint)
        return x


def make(spec, checkpoint=None, rules=None):
    torch.manual_seed(0)
    model = oftfx.transform(
        Net(checkpoint), rules or {"*": spec}, example_inputs=(torch.randn(3, 20, requires_grad=True),)
    )
    return randomize(model, std=0.1)


def products(monkeypatch, forward):
    """How many products a forward makes with rotations, and how many Cayley transforms."""
    counts = {"rotate": 0, "rotate_jointly": 0, "cayley": 0}

    def count(name, function):
        def counting(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counting

    import oftfx.placement.group as group
    import oftfx.rotation.module as module
    import oftfx.rotation.recipe as recipe

    with monkeypatch.context() as patch:
        patch.setattr(module, "rotate", count("rotate", module.rotate))
        patch.setattr(group, "rotate_jointly", count("rotate_jointly", group.rotate_jointly))
        patch.setattr(recipe, "cayley", count("cayley", recipe.cayley))
        result = forward()
    return counts, result


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (OFT(4), {"rotate": 2, "rotate_jointly": 2, "cayley": 4}),  # o alone; q, k, v in one product and one batch
        (OFT(4, share_input=True), {"rotate": 4, "rotate_jointly": 0, "cayley": 4}),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_each_group_is_evaluated_once(monkeypatch, spec, expected, training):
    model = make(spec).train(training)
    x = torch.randn(5, 20)
    assert products(monkeypatch, lambda: model(x))[0] == expected
    with torch.no_grad():
        model.eval()(x)
        again, _ = products(monkeypatch, lambda: model(x))
    assert again == {**expected, "cayley": 0}  # in eval mode the blocks are kept


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("spec", [OFT(4), OFT(4, share_input=True)], ids=["own", "shared"])
def test_checkpointing_evaluates_each_group_once_more(monkeypatch, spec, checkpoint):
    plain, model = make(spec), make(spec, checkpoint)
    x = torch.randn(5, 20, requires_grad=True)
    counts, loss = products(monkeypatch, lambda: plain(x).square().sum())
    loss.backward()
    again, loss = products(monkeypatch, lambda: model(x).square().sum())
    assert again == counts
    recomputed, _ = products(monkeypatch, loss.backward)
    assert recomputed == counts
    for a, b in zip(oftfx.adapter_parameters(plain), oftfx.adapter_parameters(model), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    "spec",
    [
        OFT(4),
        OFT(4, share_input=True),
        OFT(4, block_share=True),
        OFT(4, coft_eps=0.1),
        OFT(2, parameterization="cayley"),
    ],
    ids=str,
)
def test_outputs_and_gradients_equal_dense_algebra(spec):
    model = make(spec).double().train()
    x = torch.randn(2, 3, 20, dtype=torch.float64)
    plan = oftfx.adapters(model)["default"]
    skews = dict(model.named_parameters())

    def reference(tree):
        def weight(layer):
            owner = plan[layer].owner
            skew = skews[f"{owner}.oft.default.skew"]
            if spec.coft_eps is not None:
                limit = spec.coft_eps / plan[layer].blocks ** 0.5
                skew = skew * (limit / (2 * skew.square().sum(1, keepdim=True)).sqrt()).clamp(max=1)
            r = dense_rotation(skew, plan[layer].block_size, plan[layer].blocks, parameterization=spec.parameterization)
            return tree.get_submodule(layer).weight @ r.T

        y = x
        for i in range(2):
            part = tree.get_submodule(f"layers.{i}")
            z = part.norm(y)
            parts = [z @ weight(f"layers.{i}.{n}").T + part.get_submodule(n).bias for n in "qkv"]
            y = y + torch.cat(parts, dim=-1) @ weight(f"layers.{i}.o").T + part.o.bias
        return y

    with torch.no_grad():
        assert rel(model(x), reference(model)) < 1e-12


def test_sites_of_other_sizes_or_adapters_fall_back_to_their_own_product(monkeypatch):
    rules = {"*.q": OFT(4), "*.k": OFT(5), "*.v": OFT(4, dropout=0.5)}
    model = make(None, rules=rules).eval()
    x = torch.randn(5, 20)
    expected = model(x)
    counts, _ = products(monkeypatch, lambda: model(x))
    assert counts == {"rotate": 2, "rotate_jointly": 2, "cayley": 4}  # q and v together, k alone
    for _, placement in rotated_sites(model):
        placement.group = None
    assert rel(model(x), expected) < 1e-6
    oftfx.add_adapter(model, "second", {"*.q": OFT(2)})
    oftfx.set_adapter(model, ["default", "second"])
    folded = oftfx.fold(randomize(model, std=0.1)).model
    assert rel(folded(x), model(x)) < 1e-5


def test_a_copy_has_groups_of_its_own():
    model = make(OFT(4))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 20)
    expected = model(x)
    randomize(twin, std=0.2, seed=3)
    assert rel(twin(x), expected) > 1e-2
    assert torch.equal(model(x), expected)
    groups = {id(p.group) for m in (model, twin) for _, p in rotated_sites(m) if p.group is not None}
    assert len(groups) == 4


def test_what_waits_does_not_outlive_the_input():
    model = make(OFT(4)).eval()
    placements = {p.site: p for _, p in rotated_sites(model)}
    q, handout = placements["layers.0.q"], placements["layers.0.q"].group.handout
    x = torch.randn(5, 20)
    with torch.no_grad():
        first = q.rotate(x)
        assert sorted(handout.waiting) == ["layers.0.k", "layers.0.v"]
        second = placements["layers.0.k"].rotate(x)
        assert sorted(handout.waiting) == ["layers.0.v"]
        assert rel(second, first) > 1e-3
        x.add_(1)
        assert rel(placements["layers.0.v"].rotate(x), placements["layers.0.v"].alone(x)) < 1e-6
        del x
        assert not handout.waiting
    y = torch.randn(5, 20)
    q.rotate(y).sum().backward()
    placements["layers.0.k"].rotate(y).sum().backward()  # would fail on a graph that is used up


@pytest.mark.parametrize("checkpoint", [None, False])
@pytest.mark.parametrize("spec", [OFT(4), OFT(4, share_input=True)], ids=["own", "shared"])
def test_compiled_models_evaluate_each_group_once_and_break_nowhere(spec, checkpoint):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    products = []

    def count(graph, _):
        names = [str(n.target) for n in graph.graph.nodes]
        products.append(sum(n in ("aten.bmm.default", "oftfx.turned.default") for n in names))
        return make_boxed_func(graph.forward)

    model = make(spec, checkpoint).train()
    x = torch.randn(5, 20)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(x)
    assert (explained.graph_break_count, explained.graph_count) == (0, 1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=count, inference_compiler=count), fullgraph=True)
    compiled(x).square().sum().backward()
    assert products[0] == 4  # per layer: one for q, k, v together and one for o
    got = [p.grad.clone() for p in oftfx.adapter_parameters(model)]
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(rel(g, p.grad) < 1e-6 for g, p in zip(got, oftfx.adapter_parameters(model), strict=True))
    products.clear()
    with torch.no_grad():
        compiled.eval()(x)
    assert products == [4]


@pytest.mark.parametrize("spec", [OFT(4), OFT(4, share_input=True)], ids=["own", "shared"])
def test_threads_that_read_one_tensor_have_a_graph_each(spec):
    model = make(spec).eval()
    sites = {p.site: p for _, p in rotated_sites(model)}
    q, k = sites["layers.0.q"], sites["layers.0.k"]
    x = torch.randn(5, 20)
    with ThreadPoolExecutor(1) as other:
        mine, others = [q.rotate(x)], [other.submit(q.rotate, x).result()]
        mine.append(k.rotate(x))
        others.append(other.submit(k.rotate, x).result())
    for parts in (mine, others):
        torch.cat(parts).sum().backward()  # would fail on a graph that is used up


class Overwritten(nn.Module):
    """Reads a tensor, writes to it or to a view of it, and reads it again."""

    def __init__(self, write):
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(20), nn.Linear(20, 8), nn.Linear(20, 8)
        self.write = write

    def forward(self, x):
        y = self.norm(x)
        q = self.q(y)
        self.write(y)
        return q + self.k(y)


def zero_some(y):
    y[:, :4] = 0


def add_to_a_view(y):
    y.view(-1)[::3].add_(1)


@pytest.mark.parametrize("write", [zero_some, add_to_a_view])
@pytest.mark.parametrize("spec", [OFT(4), OFT(4, share_input=True)], ids=["own", "shared"])
def test_a_tensor_that_is_written_to_between_two_readers_is_rotated_again(spec, write):
    x = torch.randn(5, 20)
    torch.manual_seed(0)
    model = oftfx.transform(nn.Sequential(Overwritten(write)).eval(), {"*": spec}, example_inputs=(x,))
    randomize(model, std=0.2)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = ungrouped(model, x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        exported = [torch.export.export(model, (x,), strict=s).module() for s in (False, True)]
        for found in (model, compiled, *exported):
            assert rel(found(x), expected) < 1e-6


@pytest.mark.parametrize("what", ["fused step", "unfreeze"])
@pytest.mark.parametrize("spec", [OFT(4), OFT(4, share_input=True)], ids=["own", "shared"])
def test_what_changes_a_rotation_between_two_readers_is_seen(spec, what):
    model = make(spec).eval()
    sites = {p.site: p for _, p in rotated_sites(model)}
    q, k = sites["layers.0.q"], sites["layers.0.k"]
    skews = list(oftfx.adapter_parameters(model))
    x = torch.randn(5, 20)
    if what == "fused step":
        optimizer = torch.optim.AdamW(skews, lr=0.1, fused=True)
        for skew in skews:
            skew.grad = torch.randn_like(skew)
        with torch.no_grad():
            before = q.rotate(x)
            optimizer.step()
            found = k.rotate(x)
            assert rel(found, k.alone(x)) < 1e-6
            assert rel(q.rotate(x), before) > 1e-2
    else:
        for skew in skews:
            skew.requires_grad_(False)
        q.rotate(x)
        for skew in skews:
            skew.requires_grad_()
        assert k.rotate(x).requires_grad


def plain():
    torch.manual_seed(0)
    return Net()


def ungrouped(model, x):
    """What a model computes where every site rotates for itself."""
    model = copy.deepcopy(model)
    for _, placement in rotated_sites(model):
        placement.group = None
    return model(x)


@pytest.mark.parametrize("spec", [OFT(4), OFT(4, share_input=True)], ids=["own", "shared"])
def test_another_adapter_of_a_removed_ones_name_acts_with_its_own_rotations(spec):
    """A second adapter keeps the sites' placements, so only the rotations behind the name are other ones."""
    x = torch.randn(5, 20)
    model = make(spec).eval()
    oftfx.add_adapter(model, "second", {"*": spec}, example_inputs=(x,))
    groups = {id(p.group): p.group for _, p in rotated_sites(model) if p.group is not None}.values()
    plan = oftfx.adapters(model)["default"]
    with torch.no_grad():
        before = model(x)
        with pytest.warns(OftfxWarning, match="'second' acts now"):
            oftfx.remove_adapter(model, "default")
        oftfx.add_adapter(model, "default", plan)  # a plan needs no recording, which would run the model in between
        oftfx.set_adapter(model, "default")
        assert torch.equal(model(x), plain()(x))  # a new adapter is the identity
        randomize(model, std=0.2, seed=3)
        assert rel(model(x), ungrouped(model, x)) < 1e-6
        assert rel(model(x), before) > 1e-2
        assert all(g._known[1] for g in groups)
        with pytest.warns(OftfxWarning, match="'second' acts now"):
            oftfx.remove_adapter(model, "default")
        assert all(g._known == (None, {}) and g._kept is None and not g.handout.waiting for g in groups)


@pytest.mark.parametrize("spec", [OFT(4), OFT(4, share_input=True)], ids=["own", "shared"])
def test_rotations_that_are_frozen_again_count_at_once(spec):
    """What a fold that keeps quantized weights does, undone and done again after more training."""
    model = make(spec).eval()
    x = torch.randn(5, 20)
    with torch.no_grad():
        before = model(x)
        names = {m: n for n, m in model.named_modules()}
        undo = [Undo.of(names[p.module], p, p.weight_format()) for _, p in rotated_sites(model)]
        FreezeRotations().run(Program.of(model))
        assert rel(model(x), before) < 1e-6
        for site in undo:
            site.restore(model)
        randomize(model, std=0.2, seed=3)
        FreezeRotations().run(Program.of(model))
        assert rel(model(x), ungrouped(model, x)) < 1e-6
        assert rel(model(x), before) > 1e-2


def test_members_that_nothing_acts_at_do_not_stop_the_others_from_sharing(monkeypatch):
    """An adapter on three sites, then another on two of them: those two still get one product."""
    x = torch.randn(5, 20)
    model = make(OFT(4, share_input=True)).eval()
    rules = {"*.q": OFT(4, share_input=True), "*.k": OFT(4, share_input=True)}
    oftfx.add_adapter(model, "second", rules, example_inputs=(x,))
    oftfx.set_adapter(model, "second")
    randomize(model, std=0.1)
    counts, _ = products(monkeypatch, lambda: model(x))
    assert counts["rotate"] == 2  # one a layer
    oftfx.set_adapter(model, None)
    assert torch.equal(model(x), plain()(x))


def test_groups_of_similar_names_keep_their_results_apart():
    keys = ["a.b_c", "a_b.c", "a_b_c", "a.b.c", "a._b", "a_.b", "a_d.b", "a.d_b", "a_u.b"]
    names = {HandOut(key).attribute for key in keys}
    assert len(names) == len(keys)
    assert all(name.isidentifier() for name in names)
