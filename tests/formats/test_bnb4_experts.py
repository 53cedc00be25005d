"""Experts in 4 bits, as bitsandbytes' parametrization quantizes them: trained, folded, undone, written."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterFileError, FoldError, OftfxWarning, RuleError
from oftfx.formats.bnb4_experts import Bnb4Experts, four_bit_parameters
from oftfx.formats.layout import Layout
from oftfx.placement.find import rotated_sites
from tests.reference import dense_rotation, randomize, rel

pytestmark = pytest.mark.needs("transformers", "bitsandbytes")

NAMES = ("gate_up_proj", "down_proj")
RULES = {"*.experts.*_proj": OFT(16)}


def build(family, **sizes):
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    small = {
        "vocab_size": 131, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16, **sizes,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**small)).eval().requires_grad_(False)
    kinds = ["full_attention"] * small["num_hidden_layers"]
    return GptOssForCausalLM(GptOssConfig(**small, layer_types=kinds)).eval().requires_grad_(False)


def cast(model, dtype):
    """As a model is loaded: its buffers (frequencies) stay what they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def quantized(family="mixtral", *, double=False, kind="nf4", dtype=torch.float32, **sizes):
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = cast(build(family, **sizes), dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for layer in model.model.layers:
        for name in NAMES:
            replace_parameter_4bit(layer.mlp.experts, name, quant_type=kind, compress_statistics=double)
    return model


def floats(family, model, turned=True, **sizes):
    """The float model of the same values, in float64, experts turned as the rotations of ``model`` say."""
    plain = build(family, **sizes).double()
    plain.set_experts_implementation("eager")  # the default takes no float64
    state = {n: p.double() for n, p in model.named_parameters() if "parametrizations" not in n and ".oft" not in n}
    sites = dict(rotated_sites(model))
    for i, layer in enumerate(model.model.layers):
        for name in NAMES:
            with oftfx.disable_adapters(model) if turned else nullcontext():
                weight = getattr(layer.mlp.experts, name).detach().double()
            path = f"model.layers.{i}.mlp.experts.{name}"
            if turned and path in sites:
                skew = sites[path].rotations["default"].skew.detach()
                each = skew.view(len(weight), -1, skew.shape[1]) if sites[path].each else [skew] * len(weight)
                blocks = [dense_rotation(s, 16) for s in each]
                weight = torch.stack(
                    [w @ r.T if family == "mixtral" else r @ w for w, r in zip(weight, blocks, strict=True)]
                )
            state[path] = weight
    plain.load_state_dict(state)
    return plain


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["experts", "experts_columns"])
def test_values_and_bytes(layout, dtype, kind, double):
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    module = nn.Module()
    module.w = nn.Parameter(torch.randn(3, 40, 64, dtype=dtype))
    replace_parameter_4bit(module, "w", quant_type=kind, compress_statistics=double)
    known = Bnb4Experts("w", Layout(layout), "experts", ("weight",))
    assert known.matches(module)
    stored = module.w.float()
    matrix = known.dequantize(module)
    wanted = stored if layout == "experts" else stored.transpose(1, 2)
    assert torch.equal(matrix, wanted.flatten(0, 1))
    shape = known.geometry(module)
    assert (shape.in_features, shape.out_features) == ((64, 40) if layout == "experts" else (40, 64))
    assert shape.experts == 3
    before = module.state_dict()
    known.write(module, known.requantize(matrix, module))
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    new = torch.randn_like(matrix)
    known.write(module, known.requantize(new, module))
    assert rel(known.dequantize(module), new) < (0.1 if kind == "nf4" else 0.13)
    assert torch.equal(known.dequantize(module), known.layout(module).matrix(module.w.float()))


@pytest.mark.parametrize("experts", ["shared", "each"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_against_dense_float64(family, experts, ids):
    base = quantized(family)
    model = randomize(oftfx.transform(base, {"*.experts.*_proj": OFT(16, experts=experts)}), std=0.2)
    plan = oftfx.adapters(model)["default"]
    assert {(e.site.format, e.site.kind, e.site.experts) for e in plan} == {("bnb4", "experts", 3)}
    first = "activation" if experts == "shared" else "weight"
    assert [e.placement for e in plan] == [first, "weight"] * 2
    exact = floats(family, model)
    wanted = logits(exact, ids())
    assert rel(logits(model, ids()), wanted) < 2e-6
    assert rel(logits(base, ids()), wanted) > 1e-2
    with oftfx.disable_adapters(model):
        assert torch.equal(logits(model, ids()), logits(base, ids()))
    actions = {"keep": "kept", "float": "dequantized", "requantize": "requantized"}
    before = {k: v.clone() for k, v in base.state_dict().items()}
    for policy, action in actions.items():
        result = oftfx.fold(model, quantized=policy)
        assert [s.action for s in result.report] == [action] * 4
        error = rel(logits(result.model, ids()), wanted)
        assert error < 2e-6 if policy != "requantize" else 1e-4 < error < 0.5
        if policy == "requantize":
            assert all(0.05 < s.relative_error < 0.12 for s in result.report)
            assert rel(logits(result.model, ids()), logits(floats(family, result.model, turned=False), ids())) < 2e-6
        assert len([*four_bit_parameters(result.model)]) == (0 if policy == "float" else 4)
        restored = oftfx.unfold(result)
        assert torch.equal(logits(restored, ids()), logits(model, ids()))
        assert len([*four_bit_parameters(restored)]) == 4
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert len([*four_bit_parameters(base)]) == 4
    logits(base, ids())  # the class that copies share still computes its parameters


def test_gradients(ids):
    model = randomize(oftfx.transform(quantized(), RULES), std=0.1)
    loss = model(**ids()).logits.square().mean()
    loss.backward()
    skews = dict(model.named_parameters())
    for name in ("model.layers.0.mlp.experts.oft_gate_up_proj", "model.layers.1.mlp.experts.oft_down_proj"):
        skew = skews[f"{name}.default.skew"]
        direction, start, h = torch.randn_like(skew), skew.detach().clone(), 1e-3
        found = []
        for sign in (1, -1):
            skew.data = start + sign * h * direction
            found.append(float(logits(floats("mixtral", model), ids()).square().mean()))
        skew.data = start
        expected = (found[0] - found[1]) / (2 * h)
        assert float((skew.grad * direction).sum()) == pytest.approx(expected, rel=1e-2)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".oft" not in n and "oft_" not in n)


def test_adapters_come_and_go(ids, tmp_path):
    base = quantized()
    model = randomize(oftfx.transform(base, RULES), std=0.2)
    turned = logits(model, ids())
    oftfx.save_adapter(model, tmp_path / "adapter", convention="oftfx")
    other = oftfx.transform(base, RULES, adapter="first")
    oftfx.load_adapter(other, tmp_path / "adapter", adapter="second")
    assert torch.equal(logits(other, ids()), logits(base, ids()))
    oftfx.set_adapter(other, "second")
    assert rel(logits(other, ids()), turned) < 1e-6
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids()), turned)
    oftfx.remove_adapter(twin, "default")
    assert torch.equal(logits(twin, ids()), logits(base, ids()))
    assert {len(m.mlp.experts.parametrizations[n]) for m in twin.model.layers for n in NAMES} == {1}
    assert torch.equal(logits(model, ids()), turned)
    assert not any(k.startswith("model.layers.0.mlp.experts.parametrizations") for k in model.state_dict())


def test_the_packages_own_loader_reads_a_folded_state_dict(ids):
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    model = randomize(oftfx.transform(quantized(double=True), RULES), std=0.2)
    folded = oftfx.fold(model, quantized="requantize").model
    state, fresh = folded.state_dict(), build("mixtral")
    for i, layer in enumerate(fresh.model.layers):
        for name in NAMES:
            path = f"model.layers.{i}.mlp.experts.{name}"
            found = {k.removeprefix(f"{path}."): state.pop(k) for k in [*state] if k.startswith(f"{path}.")}
            setattr(layer.mlp.experts, name, nn.Parameter(state.pop(path), requires_grad=False))
            replace_parameter_4bit_prequantized(layer.mlp.experts, name, found, torch.device("cpu"))
    fresh.load_state_dict(state, strict=False)
    assert torch.equal(logits(fresh, ids()), logits(folded, ids()))


def test_one_site_as_floats_and_the_other_in_bits(ids):
    """Either may change first, and be undone first: the class that torch made has a property for each."""
    model = randomize(oftfx.transform(quantized(), RULES), std=0.2)
    wanted = logits(model, ids())
    for part in NAMES:
        result = oftfx.fold(model, quantized=lambda site, part=part: "float" if part in site.fqn else "keep")
        assert rel(logits(result.model, ids()), wanted) < 2e-6
        experts = result.model.model.layers[0].mlp.experts
        assert [n for n, _ in experts.named_parameters(recurse=False)] == [part]
        assert torch.equal(logits(oftfx.unfold(result), ids()), wanted)
        assert torch.equal(logits(copy.deepcopy(result.model), ids()), logits(result.model, ids()))


def only_down(site):
    return "float" if "down" in site.fqn else "requantize"


@pytest.mark.parametrize("given", ["nothing", "floats", "bits"])
@pytest.mark.parametrize("policy", ["keep", "requantize", only_down])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_folded_model_is_saved_and_read(family, policy, given, ids, tmp_path):
    double = policy == "requantize"
    rules = {"*.gate_up_proj": OFT(16, experts="each"), "*.experts.down_proj": OFT(16)}
    model = randomize(oftfx.transform(quantized(family, double=double, dtype=torch.bfloat16), rules), std=0.2)
    result = oftfx.fold(model, quantized=policy)
    result.save(tmp_path / "folded")
    into = {
        "nothing": lambda: None,
        "floats": lambda: cast(build(family), torch.bfloat16),
        "bits": lambda: quantized(family, double=double, kind="fp4", dtype=torch.bfloat16),
    }[given]()
    loaded = oftfx.load_folded(tmp_path / "folded", into)
    assert into is None or loaded is into
    assert type(loaded) is type(result.model)
    assert torch.equal(logits(loaded, ids()), logits(result.model, ids()))
    assert [*four_bit_parameters(loaded)] == [*four_bit_parameters(result.model)]
    again = oftfx.transform(loaded, rules)  # the bytes are the file's, as of any other base
    assert torch.equal(logits(again, ids()), logits(loaded, ids()))


def test_a_state_of_other_experts_is_refused_before_anything_changes(ids, tmp_path):
    model = randomize(oftfx.transform(quantized(), RULES), std=0.2)
    oftfx.fold(model, quantized="requantize").save(tmp_path / "folded")
    other = quantized(intermediate_size=128)
    before = logits(other, ids())
    with pytest.raises(AdapterFileError, match=r"gate_up_proj is \(3, 128, 64\) in the file, \(3, 256, 64\)"):
        oftfx.load_folded(tmp_path / "folded", other)
    assert torch.equal(logits(other, ids()), before)
    with pytest.raises(AdapterFileError, match=r"Sequential has no parameter model\.layers\.0"):
        oftfx.load_folded(tmp_path / "folded", nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning")
def test_what_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")  # whose kernel misreads these
    with pytest.raises(RuleError, match="blocks that cross rows"):
        oftfx.plan(quantized(intermediate_size=32), {"*.experts.down_proj": OFT(16)})
    assert len(oftfx.plan(quantized(intermediate_size=32), {"*.experts.gate_up_proj": OFT(16)})) == 2
    assert len(oftfx.plan(quantized(), "all-linear").coverage.unreached) == 2 * 3 + 2


def data(batches, length=32, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(131, (4, length), generator=generator)} for _ in range(batches)]


@pytest.mark.parametrize(
    ("family", "experts", "double"),
    [("mixtral", "shared", False), ("mixtral", "each", True), ("gpt_oss", "shared", True), ("gpt_oss", "each", False)],
)
def test_calibrated_one_by_one(family, experts, double):
    """Each expert is rounded for the rows it reads: the model's outputs on other inputs are nearer than by rounding."""
    model = randomize(
        oftfx.transform(quantized(family, double=double), {"*.experts.*_proj": OFT(16, experts=experts)}), std=0.1
    )
    fresh = {"input_ids": torch.cat([batch["input_ids"] for batch in data(8, seed=4)])}
    wanted = logits(floats(family, model), fresh)
    plain = oftfx.fold(model, quantized="requantize").model
    result = oftfx.fold(model, quantized="calibrate", calibration=data(24))
    # By the median token: one that a rounding sends to other experts is as wrong in either.
    calibrated, nearest = ((logits(m, fresh) - wanted).norm(dim=-1).median() for m in (result.model, plain))
    assert calibrated < 0.75 * nearest
    # What the package reads of the bytes are the values that the model has.
    assert rel(logits(result.model, fresh), logits(floats(family, result.model, turned=False), fresh)) < 2e-6
    assert len([*four_bit_parameters(result.model)]) == 4
    for row in result.report:
        assert row.action == "calibrated"
        assert row.tokens == 24 * 4 * 32 * 2  # each token goes to two experts
        assert 0.9 < row.output_survival < 1.1
    assert torch.equal(logits(oftfx.unfold(result), fresh), logits(model, fresh))


def test_an_expert_that_reads_nothing_is_rounded_to_the_nearest():
    model = randomize(oftfx.transform(quantized(), RULES), std=0.2)
    with torch.no_grad():
        router = model.model.layers[0].mlp.gate
        weight = next(router.parameters())
        weight[2] = 0
        weight[:2] = 0  # equal scores: the first two are chosen
    with pytest.warns(OftfxWarning, match="1 of 3 experts was reached by no calibration input"):
        result = oftfx.fold(model, quantized="calibrate", calibration=data(4))
    rows = {row.fqn: row for row in result.report}
    assert "1 of 3 experts was reached" in rows["model.layers.0.mlp.experts.gate_up_proj"].note
    assert "reached" not in rows["model.layers.1.mlp.experts.gate_up_proj"].note
    nearest = oftfx.fold(model, quantized="requantize").model
    for one, other, same in zip(
        result.model.model.layers[0].mlp.experts.gate_up_proj,
        nearest.model.layers[0].mlp.experts.gate_up_proj,
        (False, False, True),
        strict=True,
    ):
        assert torch.equal(one, other) == same


def test_few_tokens_are_said_and_a_budget_tries():
    model = randomize(oftfx.transform(quantized(), RULES), std=0.2)
    few = oftfx.fold(model, quantized="calibrate", calibration=data(1, length=8)).report
    assert all(row.few_tokens and "experts have read few tokens for 64 input features" in row.note for row in few)
    strict, loose = (
        oftfx.fold(model, quantized=oftfx.Budget(error, ("calibrate", "keep")), calibration=data(8)).report
        for error in (1e-4, 0.5)
    )
    assert {row.action for row in strict} == {"kept"}
    assert {row.action for row in loose} == {"calibrated"}


def test_a_forward_that_shows_nothing_says_so(monkeypatch):
    model = randomize(oftfx.transform(quantized(), {"*.layers.0.mlp.experts.gate_up_proj": OFT(16)}), std=0.2)
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def forward(self, hidden_states, *_):
        return torch.einsum("...i,eoi->...o", hidden_states, self.gate_up_proj)[..., :64]

    monkeypatch.setattr(MixtralExperts, "forward", forward)
    with pytest.warns(OftfxWarning, match="cannot be seen from outside"):
        (row,) = oftfx.fold(model, quantized="calibrate", calibration=data(2)).report
    assert row.action == "requantized"
    assert "cannot be seen" in row.note


def test_a_reference_is_a_function(ids):
    original = build("mixtral")
    model = randomize(oftfx.transform(quantized(), RULES), std=0.2)
    with pytest.raises(FoldError, match="the reference has no weight for it"):
        oftfx.fold(model, quantized="reference", reference=original)
    result = oftfx.fold(model, quantized="reference", reference=lambda fqn: original.get_parameter(fqn).flatten(0, 1))
    for (fqn, placement), row in zip(rotated_sites(model), result.report, strict=True):
        assert row.action == "from reference"
        skew = placement.rotations["default"].skew
        wanted = original.get_parameter(fqn).double() @ dense_rotation(skew, 16).T
        holder, _, name = fqn.rpartition(".")
        assert rel(getattr(result.model.get_submodule(holder), name), wanted) < 0.11


@pytest.mark.needs("onnx", "onnxruntime", "onnxscript")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("policy", ["keep", "requantize", "float"])
def test_export(family, policy, ids, tmp_path):
    """ONNX Runtime's logits are torch's; experts that stay in 4 bits take a byte for two numbers in the file."""
    model = randomize(oftfx.transform(quantized(family, double=True), RULES), std=0.2)
    folded = oftfx.fold(model, quantized=policy).model
    result = oftfx.export_onnx(folded, tmp_path / "m.onnx", ids())
    import onnxruntime

    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    got = session.run(["logits"], {k: v.numpy() for k, v in ids().items()})[0]
    assert rel(torch.from_numpy(got), logits(folded, ids())) < 1e-5
    numbers = sum(p.numel() for n, p in build(family).named_parameters() if n.endswith(NAMES))
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert (size > 4 * numbers) == (policy == "float")


@pytest.mark.parametrize("name", ["FP8Experts", "Mxfp4GptOssExperts"])
def test_experts_of_kernels_are_refused_with_the_way_out(name):
    from transformers import GptOssConfig
    from transformers.integrations import finegrained_fp8, mxfp4

    config = GptOssConfig(hidden_size=64, intermediate_size=32, num_local_experts=3, hidden_act="silu")
    made = {
        "FP8Experts": lambda: finegrained_fp8.FP8Experts(config, block_size=(32, 32)),
        "Mxfp4GptOssExperts": lambda: mxfp4.Mxfp4GptOssExperts(config),
    }[name]()
    model = nn.ModuleDict({"experts": made, "head": nn.Linear(4, 4)})
    with pytest.raises(RuleError, match=rf"codes of these {name}.*\(dequantize=True\)"):
        oftfx.plan(model, {"experts.down_proj": OFT(16)})
