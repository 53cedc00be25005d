"""What each policy makes of a quantized network, against dense algebra on recorded inputs; refusals and undoing."""

import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

import oftfx
from oftfx import OFT, Budget
from oftfx.errors import FoldError, OftfxWarning
from oftfx.formats.registry import format_named, format_of
from tests.quantized import (
    NAMES,
    WIDTH,
    assert_same,
    hooks,
    inputs,
    network,
    original,
    rotated,
    rotations,
    run,
    stored,
    weight,
)
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("bitsandbytes")

EVERY = {
    "keep": "keep",
    "float": "float",
    "requantize": "requantize",
    "calibrate": "calibrate",
    "reference": "reference",
    "budget": Budget(0.05, ("requantize", "calibrate", "keep")),
    "budget to float": Budget(1e-9, ("calibrate", "float")),
    "mixed": lambda site: {"q": "float", "k": "keep", "v": "calibrate", "o": "requantize", "up": "reference"}[
        site.fqn.split(".")[-1]
    ],
}
EXACT = ("kept", "dequantized")


def fold(model, policy, **kwargs):
    options = {"calibration": inputs(), "reference": original(), **kwargs}
    return oftfx.fold(model, quantized=EVERY.get(policy, policy) if isinstance(policy, str) else policy, **options)


def rows_of(result):
    return {s.fqn: s for s in result.report}


def inputs_of(model, name, batches):
    """All rows that a layer reads."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(a[0]), prepend=True)
    run(model, batches)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen]).double()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("policy", "action"), [("keep", "kept"), ("float", "dequantized")])
def test_exact_policies(policy, action, share):
    model = rotated(share)
    result = fold(model, policy)
    assert {s.action for s in result.report} == {action}
    for name, rotation in rotations(model).items():
        base = weight(model, name).double()
        assert rel(weight(result.model, name), base if policy == "keep" else base @ rotation.T) < 3e-7
    assert rel(run(result.model, inputs()), run(model, inputs())) < 2e-6


def test_requantize_is_the_nearest_codes_of_the_dense_product():
    model = rotated()
    result = fold(model, "requantize", calibration=None)
    table = model.blocks[0].q.weight.quant_state.code.double()
    for name, rotation in rotations(model).items():
        base, now = weight(model, name).double(), weight(result.model, name)
        target = base @ rotation.T
        blocks = target.reshape(-1, 64)
        absmax = weight(result.model, name).reshape(-1, 64).abs().amax(1).double()
        codes = (blocks[:, :, None] / absmax[:, None, None] - table).abs().argmin(-1)
        assert rel(now.reshape(-1, 64), table[codes] * absmax[:, None]) < 1e-6
        row = rows_of(result)[name]
        assert (row.action, row.output_error, row.output_survival) == ("requantized", None, None)
        assert row.relative_error == pytest.approx(rel(now, target), rel=1e-4)
        update = target - base
        assert row.survival == pytest.approx(float(((now - base) * update).sum() / update.square().sum()), rel=1e-4)


@pytest.mark.parametrize("share", [False, True])
def test_calibrate_loses_less_than_requantize_and_reports_what_it_measured(share):
    model, fresh = rotated(share), inputs(seed=9)
    results = {p: fold(model, p) for p in ("requantize", "calibrate")}
    expected = run(model, fresh)
    lost = {p: rel(run(r.model, fresh), expected) for p, r in results.items()}
    assert lost["calibrate"] < 0.9 * lost["requantize"]
    rows = rows_of(results["calibrate"])
    assert [rows[name].action for name in NAMES] == ["calibrated"] * len(NAMES)
    assert [rows[name].tokens for name in NAMES] == [len(inputs_of(model, name, inputs())) for name in NAMES]
    measured = results["calibrate"].report.output_error
    assert measured == pytest.approx(rel(run(results["calibrate"].model, inputs()), run(model, inputs())), rel=1e-4)


def test_each_site_by_a_function():
    model = rotated()
    result = fold(model, "mixed")
    actions = {
        "q": "dequantized",
        "k": "kept",
        "v": "calibrated",
        "o": "requantized",
        "up": "from reference, calibrated",
    }
    assert [s.action for s in result.report] == [actions[n.split(".")[-1]] for n in NAMES]
    assert_same(stored(result.model), stored(model), [n for n in NAMES if n.endswith(".k")])
    assert [type(result.model.get_submodule(n)) for n in NAMES if n.endswith(".q")] == [nn.Linear] * 2
    assert all(s.output_error is None for s in result.report if s.action in (*EXACT, "requantized"))


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_unfolding_restores_every_byte(policy, inplace, share):
    model = rotated(share)
    model.blocks[0].train()
    before, expected, counts = stored(model), run(model, inputs()), hooks(model)
    names = list(model.state_dict())
    result = fold(model, policy, inplace=inplace, undo=True)
    assert (result.model is model) == inplace
    folded = run(result.model, inputs())
    assert not any(isinstance(m, oftfx.rotation.module.Rotation) for m in result.model.modules())
    again = oftfx.unfold(result)
    assert (again is model) == inplace
    assert_same(stored(again), before)
    assert list(again.state_dict()) == names
    assert hooks(again) == counts
    assert torch.equal(run(again, inputs()), expected)
    assert [m.training for m in again.blocks] == [True, True]
    twice = fold(again, policy)
    assert torch.equal(run(twice.model, inputs()), folded)
    if not inplace:
        assert_same(stored(model), before)
        assert torch.equal(run(model, inputs()), expected)


@pytest.mark.parametrize("policy", EVERY)
def test_identity_rotations_change_no_byte(policy):
    model = rotated(std=0.0)
    for name in ("blocks.0.k", "blocks.1.o"):
        with torch.no_grad():
            model.get_submodule(name).oft.default.skew.normal_(std=0.05)
    result = fold(model, policy)
    still = [n for n in NAMES if n not in ("blocks.0.k", "blocks.1.o")]
    assert [s.fqn for s in result.report if s.action == "untouched"] == still
    assert_same(stored(result.model), stored(model), [*still, "head"])
    assert not any(result.model.get_submodule(n)._forward_pre_hooks for n in still)


@pytest.mark.parametrize("policy", EVERY)
def test_progress_counts_every_site_once(policy):
    seen = []
    fold(rotated(), policy, progress=lambda *a: seen.append(a))
    assert seen == [(i, 10) for i in range(1, 11)]


def test_a_budget_takes_the_first_policy_that_is_good_enough():
    """Thresholds between what was measured for each site."""
    model = rotated()
    errors = {s.fqn: s.output_error for s in fold(model, Budget(1.0, ("calibrate",))).report}
    order = sorted(errors.values())
    middle = (order[4] + order[5]) / 2
    # Later sites read other inputs once earlier ones are kept, so the first block decides what is certain.
    result = fold(model, Budget(middle, ("calibrate", "keep")))
    rows = rows_of(result)
    assert {s.action for s in result.report} == {"calibrated", "kept"}
    assert all((r.output_error or 0) <= middle for r in rows.values())
    for name in ("blocks.0.q", "blocks.0.k", "blocks.0.v"):
        assert rows[name].action == ("calibrated" if errors[name] <= middle else "kept")
    kept = [n for n, r in rows.items() if r.action == "kept"]
    assert_same(stored(result.model), stored(model), kept)
    for policies, action in (
        (("requantize", "keep"), "kept"),
        (("requantize", "calibrate", "keep"), "kept"),
        (("calibrate", "float"), "dequantized"),
        (("keep", "float"), "kept"),
    ):
        strict = fold(model, Budget(1e-9, policies))
        assert {s.action for s in strict.report} == {action}
        assert rel(run(strict.model, inputs()), run(model, inputs())) < 2e-6
    wide = fold(model, Budget(10.0))
    assert {s.action for s in wide.report} == {"requantized"}
    last = fold(model, Budget(1e-9, ("requantize", "calibrate")))
    assert {s.action for s in last.report} == {"calibrated"}


def test_a_budget_without_calibration_goes_by_the_weights_error():
    model = rotated()
    errors = {s.fqn: s.relative_error for s in fold(model, "requantize", calibration=None).report}
    order = sorted(errors.values())
    middle = (order[4] + order[5]) / 2
    result = fold(model, Budget(middle), calibration=None)  # calibrate is passed over
    assert {n: r.action for n, r in rows_of(result).items()} == {
        n: "requantized" if e <= middle else "kept" for n, e in errors.items()
    }
    assert_same(stored(result.model), stored(model), [n for n, e in errors.items() if e > middle])


@pytest.mark.parametrize("exact", ["keep", "float"])
@pytest.mark.parametrize("share", [False, True])
def test_what_a_budget_leaves_exact_is_exact_for_the_layers_behind_it(exact, share):
    """They are calibrated on the same inputs as if it had been folded exactly before the calibration began."""
    model = rotated(share)

    def split(first):
        return lambda site: first if site.fqn.startswith("blocks.0") else "calibrate"

    begun = fold(model, split(exact))
    during = fold(model, split(Budget(1e-9, ("requantize", "calibrate", exact))))
    for name in NAMES[5:]:
        assert rel(weight(during.model, name), weight(begun.model, name)) < 1e-3, name
    assert rel(run(during.model, inputs()), run(begun.model, inputs())) < 1e-4
    expected = run(model, inputs())
    assert rel(run(begun.model, inputs()), expected) < 0.5 * rel(
        run(fold(model, "requantize").model, inputs()), expected
    )
    assert hooks(during.model) == hooks(begun.model)


REFUSED = {
    "calibrate": ("calibrate", {"reference": None}, "needs calibration="),
    "at the end of a budget": (Budget(0.1, ("requantize", "calibrate")), {"reference": None}, "needs calibration="),
    "reference": ("reference", {"calibration": None}, "needs reference="),
    "in a budget": (Budget(0.1, ("requantize", "reference", "keep")), {"calibration": None}, "needs reference="),
    "of the last site": (
        lambda site: "calibrate" if site.fqn == "blocks.1.up" else "requantize",
        {"reference": None},
        r"blocks\.1\.up: policy 'calibrate' needs",
    ),
    "unknown at the last site": (
        lambda site: "calibrated" if site.fqn == "blocks.1.up" else "requantize",
        {},
        r"quantized\(Site blocks\.1\.up\): got 'calibrated'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_missing_is_refused_before_anything_changes(case, inplace):
    policy, given, message = REFUSED[case]
    model, seen = rotated(), []
    before, expected, counts = stored(model), run(model, inputs()), hooks(model)
    options = {"calibration": None, "reference": None, **given}
    with pytest.raises(FoldError, match=message):
        fold(model, policy, inplace=inplace, undo=True, progress=lambda *a: seen.append(a), **options)
    assert not seen
    assert_same(stored(model), before)
    assert hooks(model) == counts
    assert torch.equal(run(model, inputs()), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_calibration_that_fails_half_way_changes_nothing(inplace):
    model = rotated(share=True)
    before, expected, counts = stored(model), run(model, inputs()), hooks(model)
    bad = (torch.full((2, 5, WIDTH), float("nan")),)
    with pytest.raises(FoldError, match=r"blocks\.0\.q: the layer's inputs are not finite on the calibration data"):
        fold(model, "calibrate", calibration=[*inputs(), bad], inplace=inplace, undo=True)
    with pytest.raises(RuntimeError):
        fold(model, "calibrate", calibration=[*inputs(), (torch.randn(2, 5, WIDTH + 1),)], inplace=inplace, undo=True)

    def stop(done, _):
        if done == 7:
            raise KeyboardInterrupt

    for policy in ("calibrate", EVERY["budget to float"]):
        with pytest.raises(KeyboardInterrupt):
            fold(model, policy, inplace=inplace, undo=True, progress=stop)
        assert_same(stored(model), before)
        assert hooks(model) == counts
        assert torch.equal(run(model, inputs()), expected)


@pytest.mark.parametrize("given", [True, False])
def test_a_reference_rounds_the_rotated_original_weights(given):
    model, source = rotated(), original()
    result = fold(model, "reference", calibration=inputs() if given else None)
    again = fold(model, "calibrate" if given else "requantize")
    expected = original()
    for name, rotation in rotations(model).items():
        layer = expected.get_submodule(name)
        layer.weight.data = (source.get_submodule(name).weight.double() @ rotation.T).float()
        if not given:
            assert rel(weight(result.model, name), layer.weight) < 0.97 * rel(weight(again.model, name), layer.weight)
    assert {s.action for s in result.report} == {"from reference, calibrated" if given else "from reference"}
    wanted = run(expected, inputs(seed=9))
    # Rounded once instead of twice.
    assert rel(run(result.model, inputs(seed=9)), wanted) < 0.9 * rel(run(again.model, inputs(seed=9)), wanted)


def write_checkpoint(path, tensors, files=1):
    path.mkdir()
    names = list(tensors)
    parts = [names[i::files] for i in range(files)]
    places = {}
    for number, part in enumerate(parts):
        file = "model.safetensors" if files == 1 else f"model-{number + 1:05}-of-{files:05}.safetensors"
        save_file({n: tensors[n] for n in part}, path / file)
        places |= dict.fromkeys(part, file)
    if files > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def test_references_of_every_kind_give_the_same(tmp_path):
    model, source = rotated(), original()
    tensors = dict(source.state_dict())
    prefixed = {f"base.{n}": t for n, t in tensors.items()}
    expected = stored(fold(model, "reference", reference=source, calibration=None).model)
    one = write_checkpoint(tmp_path / "one", tensors)
    sources = {
        "directory": one,
        "directory as text": str(one),
        "file": one / "model.safetensors",
        "sharded": write_checkpoint(tmp_path / "sharded", tensors, 3),
        "prefix": write_checkpoint(tmp_path / "prefix", prefixed),
        "prefix, sharded": write_checkpoint(tmp_path / "both", prefixed, 3),
        "function": lambda fqn: tensors[f"{fqn}.weight"],
        "function, parameters": lambda fqn: nn.Parameter(tensors[f"{fqn}.weight"]),
    }
    for reference in sources.values():
        got = stored(fold(model, "reference", reference=reference, calibration=None).model)
        assert_same(got, expected)
    double = fold(model, "reference", reference=source.double(), calibration=None).model
    assert all(rel(weight(double, n), weight(model, n).double() @ r.T) < 0.15 for n, r in rotations(model).items())
    requantized = stored(fold(model, "requantize", calibration=None).model)
    assert any(not torch.equal(requantized[n][1][0][2], expected[n][1][0][2]) for n in NAMES)


def test_a_checkpoint_without_the_prefix_of_the_model(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.model = inner

        def forward(self, x):
            return self.model(x)

    model = randomize(oftfx.transform(Wrapped(network()), {"model.blocks.0.*": OFT(16)}))
    source = original()
    path = write_checkpoint(tmp_path / "bare", dict(source.state_dict()))
    results = [fold(model, "reference", reference=r, calibration=None) for r in (path, Wrapped(source))]
    assert_same(stored(results[0].model), stored(results[1].model))


def test_references_that_do_not_fit_are_refused_by_name(tmp_path):
    model, source = rotated(), original()
    narrow = original()
    narrow.blocks[1].k = nn.Linear(WIDTH, WIDTH - 1)
    doubled = {f"{p}.{n}": t.clone() for p in ("a", "b") for n, t in source.state_dict().items()}
    (tmp_path / "empty").mkdir()
    cases = [
        (narrow, r"blocks\.1\.k: the reference's weight has shape \(63, 64\), the layer's is \(64, 64\)"),
        (nn.Sequential(), r"blocks\.0\.q: the reference has no weight for it"),
        (network(), r"blocks\.0\.q: in the reference it is a Linear4bit, expected a layer of floats"),
        (lambda fqn: {}[fqn], r"blocks\.0\.q: the reference has no weight for it"),
        (lambda fqn: None, r"blocks\.0\.q: the reference gives a NoneType, expected a float tensor"),
        (lambda fqn: torch.ones(64, 64, dtype=torch.int8), "gives a torch.int8 tensor, expected a float tensor"),
        (write_checkpoint(tmp_path / "two", doubled), "no tensor 'blocks.0.q.weight' among"),
        (tmp_path / "empty", "reference: no safetensors files at"),
        (tmp_path / "missing", "reference: no safetensors files at"),
    ]
    before, expected = stored(model), run(model, inputs())
    for reference, message in cases:
        with pytest.raises(FoldError, match=message):
            fold(model, "reference", reference=reference, calibration=None, inplace=True, undo=True)
        assert_same(stored(model), before)
        assert torch.equal(run(model, inputs()), expected)


class Gated(nn.Module):
    """Two experts; rows with a positive first element go to the first."""

    def __init__(self):
        super().__init__()
        from tests.quantized import quantize

        self.first, self.second, self.third = (quantize(nn.Linear(WIDTH, WIDTH)) for _ in range(3))

    def forward(self, x):
        y = torch.zeros_like(x)
        mine = x[:, 0] > 0
        y[mine] = self.first(x[mine])
        y[~mine] = self.second(x[~mine])  # also where no rows are left
        return y if x.sum() > -1e9 else self.third(x)


@pytest.mark.parametrize("policy", ["calibrate", "budget", "last"])
def test_layers_that_calibration_does_not_reach_are_not_taken_for_perfect(policy):
    policies = {
        "calibrate": "calibrate",
        "budget": Budget(1e-6, ("requantize", "calibrate", "keep")),
        "last": Budget(1e-6, ("requantize", "calibrate")),
    }
    model = randomize(oftfx.transform(Gated(), {"*": OFT(16)}), std=0.002)
    x = torch.randn(200, WIDTH)
    x[:, 0] = x[:, 0].abs()
    if policy == "budget":
        rows = rows_of(fold(model, policies[policy], calibration=[(x,)]))
        assert [r.action for r in rows.values()] == ["kept"] * 3
        assert not any("rounded" in r.note for r in rows.values())
        return
    with pytest.warns(OftfxWarning, match="no calibration input reached this layer") as caught:
        result = fold(model, policies[policy], calibration=[(x,)])
    rows = rows_of(result)
    assert [r.action for r in rows.values()] == ["calibrated", "requantized", "requantized"]
    assert [r.output_error is None for r in rows.values()] == [False, True, True]
    about = [str(w.message).split(":")[0] for w in caught if "no calibration input" in str(w.message)]
    assert sorted(about) == ["second", "third"]
    nearest = fold(model, "requantize", calibration=None)
    assert_same(stored(result.model), stored(nearest.model), ["second", "third"])
    assert "of 3 sites kept less than 90% of their update" in result.report.warnings[1]
    assert "quantized='calibrate'" in result.report.warnings[0]


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("inplace", [False, True])
def test_into_producers_together_with_calibrate(tiny_llama, ids, inplace):
    """The output projections' rotations go into the float value projections; the rest is calibrated behind them."""
    from tests.quantized import quantize

    base = tiny_llama(attention_bias=False)
    for block in base.model.layers:
        block.self_attn.o_proj = quantize(block.self_attn.o_proj)
        block.mlp.down_proj = quantize(block.mlp.down_proj)
    rules = {"*.o_proj": OFT(16, into="producer"), "*.down_proj": OFT(16), "*.q_proj": OFT(16)}
    model = randomize(oftfx.transform(base, rules), std=0.1)
    batches = [ids(4, 30, seed=s) for s in range(3)]
    expected = model(**ids(4, 30, seed=7)).logits.detach()
    before = stored(model)
    seen = []
    result = oftfx.fold(
        model, quantized="calibrate", into="producer", calibration=batches, inplace=inplace, undo=True,
        progress=lambda *a: seen.append(a),
    )  # fmt: skip
    actions = {s.fqn.split(".")[-1]: s.action for s in result.report}
    assert actions == {"o_proj": "into producer", "down_proj": "calibrated", "q_proj": "folded"}
    outputs = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert_same(stored(result.model), before, outputs)
    assert seen == [(i, 4) for i in range(1, 5)]
    with torch.no_grad():
        lost = rel(result.model(**ids(4, 30, seed=7)).logits, expected)
        again = oftfx.unfold(result)
        assert torch.equal(again(**ids(4, 30, seed=7)).logits, expected)
        assert_same(stored(again), before)
        options = {"quantized": "calibrate", "calibration": batches}
        site = rel(oftfx.fold(again, **options).model(**ids(4, 30, seed=7)).logits, expected)
    assert lost < 0.9 * site  # the output projections are exact here


@pytest.mark.needs("hqq", "torchao")
@pytest.mark.parametrize("kind", ["hqq", "bnb8", "torchao"])
@pytest.mark.parametrize("policy", ["calibrate", "budget", "mixed"])
def test_policies_on_other_formats(kind, policy):
    model = rotated(kind=kind)
    before = stored(model)
    expected = run(model.eval(), inputs())
    result = fold(model, policy)
    exact = [s.fqn for s in result.report if s.action == "kept"]
    assert_same(stored(result.model), before, exact)
    loss = rel(run(result.model, inputs()), expected)
    assert loss < 0.15
    assert_same(stored(oftfx.unfold(result)), before)
    assert {format_of(result.model.get_submodule(s.fqn)).name for s in result.report} <= {kind, "dense"}


@pytest.mark.needs("bitsandbytes")
def test_a_budget_by_the_update():
    """Updates of a percent, of which nearest rounding keeps little: an error of two percent allows to lose them."""
    torch.manual_seed(0)
    base = nn.Sequential(format_named("bnb4").make_tiny(256, 64))
    model = oftfx.transform(base, {"*": OFT(32, init="normal")})
    with torch.no_grad():
        for parameter in oftfx.adapter_parameters(model):
            parameter.mul_(0.04)
    nearest = oftfx.fold(model, quantized="requantize").report.sites[0]
    assert nearest.update < 0.05
    assert nearest.survival < 0.9
    (line,) = oftfx.fold(model, quantized=Budget(survival=0.9)).report
    assert line.action == "kept"
    (line,) = oftfx.fold(model, quantized=Budget(survival=nearest.survival - 0.01)).report
    assert line.action == "requantized"
    (line,) = oftfx.fold(model, quantized=Budget(error=10.0, survival=0.99)).report
    assert line.action == "kept"
    for wrong in ({}, {"survival": 0.0}, {"survival": 1.1}, {"error": -1.0, "survival": 0.5}):
        with pytest.raises(FoldError, match="Budget: "):
            Budget(**wrong)
