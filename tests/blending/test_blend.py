import math

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError
from tests.reference import dense_rotation, randomize, rel

SPECS = [
    OFT(3, parameterization="cayley"),
    OFT(4, parameterization="cayley"),
    OFT(12, parameterization="cayley"),
    OFT(blocks=4, parameterization="cayley", block_share=True),
    OFT(5, parameterization="cayley", on_indivisible="nearest"),
    OFT(1, parameterization="cayley"),
    OFT(3, parameterization="cayley", coft_eps=0.3),
    OFT(3),
    OFT(6, terms=4, block_share=True),
    OFT(4, parameterization="cayley_neumann_016"),
    OFT(3, terms=2, coft_eps=0.1),
]


def dense(rotation):
    """The whole matrix, written from the definitions."""
    spec, skew = rotation.spec, rotation.skew.detach().double()
    if spec.coft_eps is not None:  # |Q| = sqrt(2) |its upper triangle|
        limit = spec.coft_eps / math.sqrt(len(skew)) / math.sqrt(2)
        skew = torch.stack([row * min(1.0, limit / float(row.norm())) for row in skew])
    how = {"parameterization": spec.parameterization, "terms": spec.terms}
    return dense_rotation(skew, rotation.block_size, rotation.blocks, **how)


def nearest(r):
    """``R (R^T R)^(-1/2)``."""
    values, vectors = torch.linalg.eigh(r.T @ r)
    return r @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


def dense_log(r):
    """By the eigenvalues and eigenvectors of each diagonal block of R (of equal blocks together they may be any)."""
    size = next(s for s in range(1, len(r) + 1) if len(r) % s == 0 and not off_blocks(r, s).any())
    logs = []
    for block in r.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).movedim(-1, 0):
        values, vectors = torch.linalg.eig(block)
        logs.append((vectors @ torch.diag(1j * values.angle()) @ torch.linalg.inv(vectors)).real)
    return torch.block_diag(*logs)


def dense_exp(log):
    """By its series; ``torch.linalg.matrix_exp`` (2.13) is off by 4e-11 for some matrices of norm 0.1."""
    term = result = torch.eye(len(log), dtype=log.dtype)
    for power in range(1, 40):
        term = term @ (log / 8) / power
        result = result + term
    return torch.linalg.matrix_power(result, 8)


def off_blocks(r, size):
    return r * (1 - torch.block_diag(*[torch.ones(size, size)] * (len(r) // size)))


def angles(r):
    return torch.linalg.eigvals(r).angle().abs().sort().values


def made(spec, std=0.12, name="a"):
    base = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    return randomize(oftfx.transform(base, {"*": spec}, adapter=name).eval(), std)


def at(model, site, name):
    return getattr(model.get_submodule(site).oft, name)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: str(s.to_dict()))
def test_a_strength_multiplies_the_angles(spec):
    model = made(spec)
    for index, weight in enumerate([0.5, 0.0, 1.0, -1.0, 1.7]):
        oftfx.blend(model, {"a": weight}, into=f"w{index}", bound=0.2)
        for site in ("0", "2"):
            before, after = nearest(dense(at(model, site, "a"))), dense(at(model, site, f"w{index}"))
            expected = dense_exp(weight * dense_log(before))
            assert (after - expected).abs().max() < 1e-12
            assert (after @ after.T - torch.eye(12)).abs().max() < 1e-13
            if weight == 0.5:  # exactly half
                assert (angles(after) - angles(before) / 2).abs().max() < 1e-7 * (1 + angles(before).max())
    x = torch.randn(4, 12, dtype=torch.float64)
    oftfx.set_adapter(model, "w0")
    first = x @ dense(at(model, "0", "w0")) @ model[0].weight.T + model[0].bias
    last = first.tanh() @ dense(at(model, "2", "w0")) @ model[2].weight.T + model[2].bias
    assert rel(model(x), last) < 1e-13
    assert rel(oftfx.fold(model).model(x), last) < 1e-12


def test_half_strength_is_half_of_every_angle_as_reported():
    model = made(OFT(3, parameterization="cayley"), std=0.6)
    oftfx.blend(model, {"a": 0.5}, into="mild")
    whole, mild = oftfx.rotation_angles(model, "a"), oftfx.rotation_angles(model, "mild")
    pairs = zip(whole, mild, strict=True)
    differences = [abs(h - w / 2) for s, t in pairs for p, q in zip(s.angles, t.angles) for w, h in zip(p, q)]  # noqa: B905
    assert len(differences) == 24
    assert max(differences) < 1e-14
    assert whole["0"].largest > 1


def test_blending_commuting_rotations_adds_their_angles():
    model = made(OFT(4, parameterization="cayley"))
    oftfx.add_adapter(model, "b", {"*": OFT(4, parameterization="cayley")})
    with torch.no_grad():
        for site in ("0", "2"):
            at(model, site, "b").skew.copy_(at(model, site, "a").skew * -2.5)  # the same planes
    oftfx.blend(model, {"a": 1.0, "b": 0.25}, into="c")
    for site in ("0", "2"):
        a, b, c = (dense(at(model, site, n)) for n in "abc")
        assert (a @ b - b @ a).abs().max() < 1e-15
        logs = dense_log(a) + 0.25 * dense_log(b)
        assert (c - dense_exp(logs)).abs().max() < 1e-13
        by_plane = torch.linalg.eigvals(dense_log(a)).imag.abs() - 0.25 * torch.linalg.eigvals(dense_log(b)).imag.abs()
        assert (angles(c) - by_plane.abs().sort().values).abs().max() < 1e-12
    oftfx.blend(model, {"a": 1.0, "b": 1.0}, into="d")
    assert (dense(at(model, "0", "d")) - dense(at(model, "0", "a")) @ dense(at(model, "0", "b"))).abs().max() < 1e-13


@pytest.mark.parametrize(("sizes", "joint"), [((4, 12), 12), ((2, 3), 6), ((3, 3), 3), ((1, 4), 4)])
def test_block_sizes_may_differ_and_a_missing_site_is_the_identity(sizes, joint):
    model = made(OFT(sizes[0], parameterization="cayley"))
    oftfx.add_adapter(model, "b", {"0": OFT(sizes[1], parameterization="cayley", block_share=True)})
    torch.nn.init.normal_(model[0].oft.b.skew, std=0.2)
    report = oftfx.blend(model, {"a": 0.7, "b": -0.4}, into="c")
    logs = 0.7 * dense_log(dense(model[0].oft.a)) - 0.4 * dense_log(dense(model[0].oft.b))
    assert (dense(model[0].oft.c) - dense_exp(logs)).abs().max() < 1e-12
    expected = dense_exp(0.7 * dense_log(dense(model[2].oft.a)))
    assert (dense(model[2].oft.c) - expected).abs().max() < 1e-12
    assert [(s.block_size, s.adapters, s.identity) for s in report] == [
        (joint, ("a", "b"), ()),
        (sizes[0], ("a",), ("b",)),
    ]
    assert ("inside blocks" in report.sites[0].note) == (sizes[0] != sizes[1])
    assert report.sites[0].blocks == 12 // joint


def test_blocks_that_share_their_parameters_still_do():
    model = made(OFT(3, parameterization="cayley", block_share=True))
    oftfx.add_adapter(model, "b", {"*": OFT(6, block_share=True)})
    for rotation in (model[0].oft.b, model[2].oft.b):
        torch.nn.init.normal_(rotation.skew, std=0.03)
    oftfx.blend(model, {"a": 0.5, "b": 0.5}, into="c")
    assert model[0].oft.c.skew.shape == (1, 15)
    logs = 0.5 * dense_log(dense(model[0].oft.a)) + 0.5 * dense_log(nearest(dense(model[0].oft.b)))
    assert (dense(model[0].oft.c) - dense_exp(logs)).abs().max() < 1e-12


def test_in_float32_the_skew_is_rounded_and_the_report_says_how_far():
    model = randomize(oftfx.transform(nn.Sequential(nn.Linear(24, 7)), {"*": OFT(8)}, adapter="a"), 0.05)
    report = oftfx.blend(model, {"a": 0.5}, into="mild")
    expected = dense_exp(0.5 * dense_log(nearest(dense(model[0].oft.a))))
    off = (dense(model[0].oft.mild) - expected).unflatten(0, (3, 8)).unflatten(2, (3, 8))
    largest = max(float(off[i, :, i].norm()) for i in range(3))
    assert 1e-9 < largest < 1e-6
    assert abs(report.sites[0].error - largest) < 1e-12


@pytest.mark.parametrize("weights", [{"a": 0.5}, {"a": 1.0}])
def test_a_rotation_by_pi_is_refused_by_site_and_block(weights):
    model = made(OFT(2, parameterization="cayley"))
    with torch.no_grad():
        model[2].oft.a.skew[4] = 1e9
    with pytest.raises(AdapterError, match=r"adapter 'a': 2: block 4 turns by 3\.14159"):
        oftfx.blend(model, weights, into="b")
    assert list(oftfx.adapters(model)) == ["a"]
    assert not any(".b." in k for k in model.state_dict())


def test_a_result_of_pi_is_refused_and_beyond_it_is_the_power():
    model = made(OFT(2, parameterization="cayley"))
    with torch.no_grad():
        model[0].oft.a.skew[3] = 1.0  # a right angle
    with pytest.raises(AdapterError, match=r"0: by weights \{'a': 2\.0\} block 3 turns by 3\.14159"):
        oftfx.blend(model, {"a": 2}, into="b")
    oftfx.blend(model, {"a": 3}, into="b")
    assert (dense(model[0].oft.b) - torch.linalg.matrix_power(dense(model[0].oft.a), 3)).abs().max() < 1e-12


def test_so_near_pi_that_float32_cannot_hold_the_skew():
    model = oftfx.transform(nn.Sequential(nn.Linear(8, 3)), {"*": OFT(8, parameterization="cayley")}, adapter="a")
    u, v = torch.linalg.qr(torch.randn(8, 2)).Q.T
    row, column = torch.triu_indices(8, 8, 1)
    with torch.no_grad():  # one plane by nearly pi, the others by little
        model[0].oft.a.skew.copy_(((torch.outer(u, v) - torch.outer(v, u)) * 1e5 + torch.randn(8, 8))[row, column])
    with pytest.raises(AdapterError, match=r"so near pi that its skew in torch\.float32 is off by"):
        oftfx.blend(model, {"a": 0.9999999}, into="b")


def test_what_stretches_is_measured_left_out_and_bounded():
    model = made(OFT(4), std=0.25)
    r = dense(model[0].oft.a)
    stretch = float((torch.linalg.svdvals(r) - 1).abs().max())
    assert stretch > 0.02
    with pytest.raises(AdapterError, match=rf"adapter 'a': 0: its blocks stretch a vector by up to {stretch:.2%}"):
        oftfx.blend(model, {"a": 1}, into="b")
    report = oftfx.blend(model, {"a": 1}, into="b", bound=1)
    assert abs(report.sites[0].departure - stretch) < 1e-14
    assert report.departure == max(s.departure for s in report)
    assert (dense(model[0].oft.b) - nearest(r)).abs().max() < 1e-12


def test_what_trains_whole_is_blended_as_differences_to_the_base():
    base = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)).double()
    model = oftfx.transform(base, {"0": OFT(4)}, adapter="a", train=["1"])
    oftfx.add_adapter(model, "b", {"0": OFT(4)}, train=["1", "2"], train_bias="oft")
    found = {}
    for name in ("a", "b"):
        oftfx.set_adapter(model, name)
        for parameter in oftfx.adapter_parameters(model):
            torch.nn.init.normal_(parameter, std=0.05)
        model.train()
        for _ in range(3 if name == "a" else 6):
            model(torch.randn(9, 12, dtype=torch.float64) * 2)
        found[name] = {k: v.clone() for k, v in model.state_dict().items() if ".oft." not in k}
    oftfx.set_adapter(model, None)
    plain = {k: v.clone() for k, v in model.state_dict().items() if ".oft." not in k}
    oftfx.blend(model, {"a": 0.5, "b": 0.25}, into="c")
    oftfx.set_adapter(model, "c")
    for key in plain:
        start, a, b = plain[key].double(), found["a"][key].double(), found["b"][key].double()
        expected = start + 0.5 * (a - start) + 0.25 * (b - start)
        got = model.state_dict()[key].double()
        if key == "1.num_batches_tracked":
            assert got == round(3 * 0.5 + 6 * 0.25)
        else:
            assert (got - expected).abs().max() < 1e-15, key
    assert not torch.equal(plain["1.running_var"], model[1].running_var)
    assert rel(model[0].bias, plain["0.bias"]) > 1e-3
    with pytest.raises(AdapterError, match=r"1\.running_var would get negative"):
        oftfx.blend(model, {"b": -40.0}, into="d")
    oftfx.blend(model, {"b": 1.0}, into="e")
    oftfx.set_adapter(model, "e")
    for key in plain:
        assert torch.equal(model.state_dict()[key], found["b"][key]), key


@pytest.mark.parametrize(
    ("weights", "into", "said"),
    [
        ({}, "b", "expected a number for each adapter"),
        ({"a": math.nan}, "b", "expected a finite number"),
        ({"a": True}, "b", "expected a finite number"),
        ({"x": 1.0}, "b", "no adapter 'x'"),
        ({"a": 1.0}, "a", "already has an adapter 'a'"),
        ({"a": 1.0}, "half", "adapter name 'half'"),
    ],
)
def test_what_cannot_be_blended(weights, into, said):
    with pytest.raises(AdapterError, match=said):
        oftfx.blend(made(OFT(3)), weights, into=into)


def test_numbers_that_are_not_finite_are_named():
    model = made(OFT(3, parameterization="cayley"))
    with torch.no_grad():
        model[2].oft.a.skew[0, 0] = math.inf
    with pytest.raises(AdapterError, match="adapter 'a': 2: the rotation holds numbers that are not finite"):
        oftfx.blend(model, {"a": 0.5}, into="b")


@pytest.mark.needs("transformers")
def test_sites_share_a_rotation_where_they_do_in_every_adapter(tiny_llama, ids):
    spec = OFT(8, parameterization="cayley", share_input=True)
    model = oftfx.transform(tiny_llama(), {"*_proj": spec}, adapter="a", example_inputs=ids())
    randomize(model, 0.05)
    oftfx.add_adapter(model, "b", {"*.q_proj": OFT(16, parameterization="cayley")})
    oftfx.blend(model, {"a": 0.5}, into="shared")
    oftfx.blend(model, {"a": 0.5, "b": 1.0}, into="apart")
    plans = oftfx.adapters(model)
    layer = "model.layers.1.self_attn"
    assert {plans["shared"][f"{layer}.{k}_proj"].owner for k in "qkv"} == {f"{layer}.q_proj"}
    assert [plans["apart"][f"{layer}.{k}_proj"].owner[-6:] for k in "qkv"] == ["q_proj", "k_proj", "k_proj"]
    assert plans["shared"].rotations == plans["a"].rotations
    with torch.no_grad():  # where b is the identity, both mean the same
        outputs = []
        for name in ("shared", "apart"):
            oftfx.set_adapter(model, name)
            outputs.append(model(**ids()).logits)
    assert rel(outputs[0], outputs[1]) < 1e-6


@pytest.mark.needs("transformers")
def test_tied_blocks_stay_tied_and_fold_into_the_producer(tiny_llama, ids):
    rules = {"*.o_proj": OFT(16, parameterization="cayley", into="producer")}
    model = randomize(oftfx.transform(tiny_llama(), rules, adapter="a", example_inputs=ids()), 0.05)
    oftfx.blend(model, {"a": 0.5}, into="mild")
    entry = oftfx.adapters(model)["mild"].entries[0]
    assert entry.tied_blocks == (0, 0, 1, 1)
    oftfx.set_adapter(model, "mild")
    expected = model(**ids()).logits
    result = oftfx.fold(model, into="producer")
    assert {site.action for site in result.report} == {"into producer"}
    assert rel(result.model(**ids()).logits, expected) < 1e-5


@pytest.mark.needs("peft", "transformers")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_blend_is_saved_and_loaded_as_any_adapter_also_by_peft(tiny_llama, ids, tmp_path):
    peft = pytest.importorskip("peft")
    model = randomize(oftfx.transform(tiny_llama(), {"*_proj": OFT(8)}), 0.03)
    oftfx.save_adapter(model, tmp_path / "whole")
    loaded = oftfx.load_adapter(tiny_llama(), tmp_path / "whole")
    oftfx.blend(loaded, {"default": 0.5}, into="mild")
    oftfx.set_adapter(loaded, "mild")
    assert not any(p.requires_grad for p in loaded.parameters())
    expected = loaded(**ids()).logits
    oftfx.save_adapter(loaded, tmp_path / "mild", adapter="mild")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "mild").eval()
    assert rel(theirs(**ids()).logits, expected) <= 1e-6
    assert rel(oftfx.load_adapter(tiny_llama(), tmp_path / "mild")(**ids()).logits, expected) <= 1e-6
    # Half of a rotation, not half of an update: the exact one is not in the middle of the weights.
    q = "model.layers.0.self_attn.q_proj"
    a, b = (dense(loaded.get_submodule(q).oft.get_submodule(n)) for n in ("default", "mild"))
    assert rel((torch.eye(64) + a) / 2, b) > 1e-4


@pytest.mark.needs("bitsandbytes")
def test_codes_of_a_fold_are_no_rotation():
    from oftfx.formats import format_named

    base = nn.Sequential(format_named("bnb8").make_tiny(66, 10))
    model = oftfx.transform(base, {"*": OFT(3, init="normal")})
    oftfx.fold_aware(model, "calibrate", calibration=[(torch.randn(200, 66),)])
    for call in (
        lambda: oftfx.blend(model, {"default": 0.5}, into="b"),
        lambda: oftfx.rotation_angles(model),
        lambda: oftfx.retention(model, {"t": lambda m: 0.0}),
        lambda: oftfx.to_lora(model, "unused", rank=4),
    ):
        with pytest.raises(AdapterError, match="fold_aware"):
            call()


def test_the_report_shows_itself():
    model = made(OFT(3, parameterization="cayley"))
    report = oftfx.blend(model, {"a": 0.5}, into="mild")
    assert [len(row) for row in report.rows()] == [8, 8]
    assert "mild = 0.5 a" in str(report)
    assert "largest angle" in report.table()
    assert '"largest_angle"' in report.to_json()
