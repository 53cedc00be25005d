"""Against the singular values of dense float64 updates, and by a reader that only knows the published layout."""

import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, AdapterFileError, FoldError
from tests.reference import dense_rotation, randomize, rel


def read(directory):
    """``{path: scaling * B @ A}`` as servers read it: nothing but the keys and two numbers of the configuration."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    deltas = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            assert len(a) == b.shape[1] <= config["r"]
            deltas[path] = b.flatten(1) @ a.flatten(1) * config["lora_alpha"] / config["r"]
    return config, deltas


def update(layer):
    """``W R^T - W`` in float64, from the definitions."""
    r = dense_rotation(layer.oft.default.skew.detach(), layer.oft.default.block_size, layer.oft.default.blocks)
    w = layer.weight.detach().double()
    return w @ r.T - w


def made(*layers, spec=None, std=0.1, dtype=torch.float64):
    base = nn.Sequential(*layers).to(dtype)
    return randomize(oftfx.transform(base, {"*": spec or OFT(4)}).eval(), std)


SHAPES = [(12, 7), (12, 31), (12, 12)]


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_without_inputs_it_is_the_truncated_singular_value_decomposition(tmp_path, columns, rows, rank):
    model = made(nn.Linear(columns, rows), nn.Tanh())
    report = oftfx.to_lora(model, tmp_path, rank=rank, bound=1)
    _, deltas = read(tmp_path)
    d = update(model[0])
    values = torch.linalg.svdvals(d)
    best = float(values[rank:].square().sum() / values.square().sum())
    lost = float((deltas["0"] - d).norm() ** 2 / d.norm() ** 2)
    site = report.sites[0]
    assert (site.rank, site.full_rank, site.tokens) == (rank, min(rows, columns), None)
    assert abs(site.loss - best) < 1e-12
    assert abs(lost - best) < 1e-12
    assert abs(site.error - float((deltas["0"] - d).norm() / (model[0].weight.double() + d).norm())) < 1e-12


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
@pytest.mark.parametrize("tokens", [200, 5])
def test_with_inputs_no_matrix_of_that_rank_gives_better_outputs(tmp_path, columns, rows, tokens):
    model = made(nn.Linear(columns, rows), nn.Tanh())
    x = torch.randn(tokens, columns, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, columns).double())
    report = oftfx.to_lora(model, tmp_path / "seen", rank=3, calibration=[(x[:4],), (x[4:],)], bound=1)
    oftfx.to_lora(model, tmp_path / "unseen", rank=3, bound=1)
    d = update(model[0])
    values = torch.linalg.svdvals(x @ d.T)  # Eckart and Young: the least that rank 3 can miss
    best = float(values[3:].square().sum() / values.square().sum())
    seen, unseen = (
        float((x @ (read(tmp_path / n)[1]["0"] - d).T).norm() ** 2 / (x @ d.T).norm() ** 2) for n in ("seen", "unseen")
    )
    assert abs(seen - best) < 1e-4 * best + 1e-9
    assert abs(report.sites[0].loss - best) < 1e-3 * best + 1e-4
    assert seen < 0.5 * unseen
    assert report.sites[0].tokens == tokens
    outputs = float((x @ (model[0].weight + d).T).norm())
    missed = float((x @ (read(tmp_path / "seen")[1]["0"] - d).T).norm())
    assert abs(report.sites[0].error - missed / outputs) < 1e-2 * missed / outputs + 1e-4


@pytest.mark.parametrize(("columns", "rows"), SHAPES)
@pytest.mark.parametrize("seen", [False, True])
def test_at_full_rank_it_is_the_fold(tmp_path, columns, rows, seen):
    model = made(nn.Linear(columns, rows), nn.Tanh(), dtype=torch.float32)
    calibration = [(torch.randn(4, columns),)] if seen else None  # fewer tokens than directions
    report = oftfx.to_lora(model, tmp_path, rank=99, calibration=calibration)
    folded = oftfx.fold(model).model[0].weight.detach()
    assert rel(model[0].weight + read(tmp_path)[1]["0"], folded) < 1e-6
    assert rel(read(tmp_path)[1]["0"], update(model[0])) < 1e-6
    assert report.loss == 0


def test_energy_gives_each_site_the_smallest_rank_that_keeps_it(tmp_path):
    model = made(nn.Linear(12, 20), nn.Linear(20, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[2].oft.default.skew[1] = 0  # half of the blocks stay: half of the rank
    report = oftfx.to_lora(model, tmp_path, energy=0.9)
    config, deltas = read(tmp_path)
    for site in report:
        values = torch.linalg.svdvals(update(model.get_submodule(site.fqn))).square()
        kept = values.cumsum(0) / values.sum()
        assert site.rank == int((kept < 0.9).sum()) + 1
        assert rel(deltas[site.fqn], update(model.get_submodule(site.fqn))) <= 0.1**0.5 + 1e-9
    assert [s.full_rank for s in report] == [12, 8, 4]
    ranks = {s.fqn: s.rank for s in report}
    assert len(set(ranks.values())) > 1
    largest = max(ranks.values())
    assert config["r"] == config["lora_alpha"] == largest
    assert config["rank_pattern"] == config["alpha_pattern"] == {f"^{n}": r for n, r in ranks.items() if r != largest}
    capped = oftfx.to_lora(model, tmp_path / "capped", energy=0.99, rank=4, bound=1)
    assert max(s.rank for s in capped) == 4


def test_too_much_loss_is_refused_with_the_rank_that_would_do(tmp_path):
    model = made(nn.Linear(12, 20), nn.Linear(20, 16))
    before = oftfx.to_lora(model, tmp_path, rank=99)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    ranks, losses = {}, {}
    for name in ("0", "1"):
        values = torch.linalg.svdvals(update(model.get_submodule(name))).square()
        losses[name] = 1 - float(values[:2].sum() / values.sum())
        ranks[name] = int((values.cumsum(0) / values.sum() < 0.9).sum()) + 1
    worst = max(losses, key=losses.get)
    said = rf"{worst}: {losses[worst]:.1%} at rank 2\. Rank {ranks[worst]} would do there, {max(ranks.values())} every"
    with pytest.raises(AdapterError, match=rf"2 of 2 sites lose more than bound=0\.1 .* {said}"):
        oftfx.to_lora(model, tmp_path, rank=2)
    assert files == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert oftfx.to_lora(model, tmp_path, rank=max(ranks.values())).loss <= 0.1
    assert before.parameters > 0


def test_an_identity_is_rank_one_of_zeros(tmp_path):
    model = oftfx.transform(nn.Sequential(nn.Linear(8, 5), nn.Tanh()), {"*": OFT(4)})
    report = oftfx.to_lora(model, tmp_path, energy=0.5, bound=0.5)
    assert [(s.rank, s.full_rank, s.loss, s.error) for s in report] == [(1, 0, 0.0, 0.0)]
    assert not read(tmp_path)[1]["0"].any()


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.inner = nn.Linear(12, 12), nn.Module()
        self.inner.a = nn.Linear(12, 12)
        self.spare = nn.Linear(12, 5)

    def forward(self, x):
        return self.inner.a(self.a(x).tanh())


def test_a_layer_that_no_input_reaches_counts_all_alike(tmp_path):
    model = randomize(oftfx.transform(Layered(), {"*": OFT(4)}).eval(), 0.1)
    before = oftfx.active_adapters(model)
    report = oftfx.to_lora(model, tmp_path, rank=9, calibration=[{"x": torch.randn(30, 12)}], bound=1)
    assert [(s.fqn, s.tokens, bool(s.note)) for s in report] == [
        ("a", 30, False),
        ("inner.a", 30, False),
        ("spare", None, True),
    ]
    assert oftfx.active_adapters(model) == before
    assert "no calibration input" in report.table()
    assert json.loads(report.to_json())["loss"] == report.loss


def test_the_inputs_are_those_of_the_model_with_the_adapter(tmp_path):
    """The second layer reads what the first one makes rotated, before its own rotation."""
    model = randomize(oftfx.transform(Layered().double(), {"*": OFT(4)}).eval(), 0.3)
    oftfx.add_adapter(model, "other", {"a": OFT(3, init="normal")})
    oftfx.set_adapter(model, "other")
    x = torch.randn(50, 12, dtype=torch.float64)
    oftfx.to_lora(model, tmp_path, rank=3, calibration=[(x,)], bound=1)
    assert oftfx.active_adapters(model) == ("other",)
    y = F.linear(x, model.a.weight + update(model.a), model.a.bias).tanh().detach()
    d = update(model.inner.a)
    values = torch.linalg.svdvals(y @ d.T).square()
    best = float(values[3:].sum() / values.sum())
    assert abs(float((y @ (read(tmp_path)[1]["inner.a"] - d).T).norm() ** 2 / (y @ d.T).norm() ** 2) - best) < 1e-6


REFUSED = {
    "groups": (nn.Conv2d(8, 8, 3, groups=2), OFT(9), "in 2 groups"),
    "dilation": (nn.Conv2d(4, 8, 3, dilation=2), OFT(9), "forgets its dilation"),
    "padding": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), OFT(9), "not by 'reflect'"),
    "transposed": (nn.ConvTranspose2d(4, 8, 3), OFT(4), "no layers of kind 'conv_transpose'"),
    "max_norm": (nn.Embedding(9, 8, max_norm=1.0), OFT(4), "max_norm"),
    "attention": (nn.MultiheadAttention(8, 2), OFT(4), "other code reads this weight"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_lora_cannot_be_is_refused_by_name(tmp_path, kind):
    layer, spec, said = REFUSED[kind]
    model = oftfx.transform(nn.Sequential(nn.Linear(8, 8), layer), {"1" if kind != "attention" else "1.*": spec})
    with pytest.raises(AdapterError, match=rf"^1.* cannot be LoRA: .*{said}"):
        oftfx.to_lora(model, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, AdapterError, "give rank=.* or energy="),
        ({"rank": 0}, AdapterError, "rank: got 0"),
        ({"rank": 2.0}, AdapterError, r"rank: got 2\.0"),
        ({"energy": 1.2}, AdapterError, r"energy: got 1\.2"),
        ({"energy": 0.5}, AdapterError, r"energy=0\.5 may lose 50\.0% of an update, over bound=0\.1"),
        ({"rank": 2, "bound": -1}, AdapterError, "bound: got -1"),
        ({"rank": 2, "adapter": "x"}, AdapterError, "no adapter 'x'"),
        ({"rank": 2, "calibration": torch.ones(3, 12)}, FoldError, "expected an iterable of inputs"),
        ({"rank": 2, "calibration": [(torch.full((3, 12), torch.nan),)]}, FoldError, "0: what it reads .* not finite"),
    ],
)
def test_what_is_asked_wrongly(tmp_path, arguments, error, said):
    model = made(nn.Linear(12, 7), nn.Tanh(), dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=said):
        oftfx.to_lora(model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
    assert oftfx.active_adapters(model) == ("default",)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_place_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(AdapterFileError, match="a file is where a directory is wanted"):
        oftfx.to_lora(made(nn.Linear(12, 7)), tmp_path / "out", rank=9)
    assert (tmp_path / "out").read_text() == "mine"


def test_it_takes_the_place_of_an_adapter_of_ours(tmp_path):
    model = made(nn.Linear(12, 7), nn.Tanh())
    oftfx.save_adapter(model, tmp_path, convention="oftfx")
    oftfx.to_lora(model, tmp_path, rank=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
