"""Weights that other code reads: attention, experts, functional uses; names, errors and threads."""

import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx import OFT
from oftfx.errors import OftfxError, RuleError
from oftfx.placement.find import rotated_sites
from oftfx.rotation.frozen import FrozenRotation
from tests.reference import dense_rotation, randomize, rel


def shadows(model):
    """Parameters that are covered by a rotated weight now."""
    return [(n, k) for n, m in model.named_modules() for k in vars(m) if k in m._parameters]


def folded_by_hand(model, base):
    """The base with ``W @ R^T`` in float64, rounded to float32, for every site with a 2-D weight in rows."""
    state = {k: v.double() for k, v in base.state_dict().items()}
    for entry in oftfx.adapters(model)["default"]:
        name = entry.site.weight_name
        skew = next(p.rotations["default"].skew for f, p in rotated_sites(model) if f == entry.fqn).detach()
        state[name] = state[name] @ dense_rotation(skew, entry.block_size, entry.blocks).T
    return state


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_encoder_also_on_its_fused_path(masked, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, norm_first=norm_first)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval().requires_grad_(False)
    x = torch.randn(3, 7, 16)
    mask = torch.arange(7)[None] >= torch.tensor([7, 5, 4])[:, None] if masked else None
    model = randomize(oftfx.transform(base, {"all-linear": OFT(4)}), std=0.2)
    assert len(oftfx.adapters(model)["default"]) == 8
    by_hand = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).double().eval()
    by_hand.load_state_dict(folded_by_hand(model, base))
    keep = slice(None) if mask is None else ~mask
    with torch.no_grad():
        expected = by_hand(x.double(), src_key_padding_mask=mask)[keep]
        for candidate in (model, oftfx.fold(model).model):
            assert rel(candidate(x, src_key_padding_mask=mask)[keep], expected) < 1e-6
        assert rel(base(x, src_key_padding_mask=mask)[keep], expected) > 1e-2
    assert not shadows(model)
    attention = model.train()(x, src_key_padding_mask=mask)[keep].square().sum()
    attention.backward()
    assert all(p.grad.abs().max() > 0 for p in oftfx.adapter_parameters(model))


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}], ids=str)
def test_attention_alone(sizes):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

        def forward(self, q, k, v):
            return self.attention(q, k, v)

    base = Net().eval().requires_grad_(False)
    inputs = [torch.randn(2, n, sizes.get(d, 8)) for n, d in ((5, ""), (3, "kdim"), (3, "vdim"))]
    model = oftfx.transform(base, {"*": OFT(2)})
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(*inputs), base(*inputs), strict=True))
        randomize(model, std=0.2)
        by_hand = Net().double().eval()
        by_hand.load_state_dict(folded_by_hand(model, base))
        expected = by_hand(*(x.double() for x in inputs))
        for candidate in (model, oftfx.fold(model).model):
            assert all(rel(a, b) < 1e-6 for a, b in zip(candidate(*inputs), expected, strict=True))
    names = {n for n, _ in model.named_parameters() if ".oft" in n}
    packed = {f"attention.oft_{p}_proj_weight.default.skew" for p in "qkv"} if sizes else None
    assert names == (packed or {"attention.oft_in_proj_weight.default.skew"}) | {"attention.out_proj.oft.default.skew"}


class Functional(nn.Module):
    """A parameter of its own, a layer whose weight is read, one that is called and read, one under two operations."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))
        self.read, self.both, self.plain = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.mixed = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        y = F.linear(x, self.w)
        y = y @ self.read.weight.t() + self.read.bias
        y = self.both(y) + F.linear(y, self.both.weight)
        return self.plain(y) @ (self.mixed * 2)


def test_functional_uses_are_rotated_where_they_are_read():
    x = torch.randn(5, 8)
    base = Functional().requires_grad_(False)
    model = oftfx.transform(base, {"*": OFT(2)}, example_inputs=(x,))
    plan = oftfx.adapters(model)["default"]
    assert {(e.fqn, e.site.kind, e.placement, e.site.reader) for e in plan} == {
        ("w", "functional", "weight", None),
        ("read", "functional", "weight", ""),
        ("plain", "linear", "activation", None),
    }
    reasons = {s.fqn: s.reason for s in plan.skipped}
    assert reasons.keys() == {"both", "mixed"}
    assert "also read by other code" in reasons["both"]
    assert "used by mul" in reasons["mixed"]
    assert torch.equal(model(x), base(x))
    randomize(model, std=0.3)
    by_hand = Functional().double()
    by_hand.load_state_dict(folded_by_hand(model, base))
    expected = by_hand(x.double())
    assert rel(model(x), expected) < 1e-6
    result = oftfx.fold(model)
    assert rel(result.model(x), expected) < 1e-6
    assert torch.equal(oftfx.unfold(result)(x), model(x))
    again = oftfx.transform(base, oftfx.Plan.from_json(plan.to_json()))
    randomize(again, std=0.3)
    assert rel(again(x), expected) < 1e-6


def test_without_a_recording_a_raw_parameter_is_explained():
    with pytest.raises(RuleError, match="only a recorded forward shows how"):
        oftfx.plan(Functional(), {"w": OFT(2)})


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("experts", ["shared", "each"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_share_a_rotation_or_have_one_each(family, experts, ids):
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    small = {
        "vocab_size": 131, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8,
    }  # fmt: skip
    make = {
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**small)),
        "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**small, layer_types=["full_attention"])),
    }[family]
    base = make().eval().requires_grad_(False)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.2)
    rules = {"*.experts.*_proj": OFT(8, experts=experts)}
    model = randomize(oftfx.transform(base, rules), std=0.2)
    plan = oftfx.adapters(model)["default"]
    assert [(e.fqn.rpartition(".")[2], e.blocks) for e in plan] == [
        ("gate_up_proj", 4 * (3 if experts == "each" else 1)),
        ("down_proj", 3 * (3 if experts == "each" else 1)),
    ]
    expected = make().eval()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    for entry in plan:
        weight = state[entry.fqn].double()
        skew = next(p.rotations["default"].skew for f, p in rotated_sites(model) if f == entry.fqn).detach()
        per = skew.view(3, -1, skew.shape[1]) if experts == "each" else skew.expand(3, -1, -1)
        for index in range(3):
            r = dense_rotation(per[index], 8)
            weight[index] = r @ weight[index] if family == "gpt_oss" else weight[index] @ r.T
        state[entry.fqn] = weight.float()
    expected.load_state_dict(state)
    with torch.no_grad():
        wanted = expected(**ids()).logits
        assert rel(model(**ids()).logits, wanted) < 5e-6
        assert rel(oftfx.fold(model).model(**ids()).logits, wanted) < 5e-6
        assert rel(base(**ids()).logits, wanted) > 1e-2
    tokens = model.generate(**ids(2, 5), max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, expected.generate(**ids(2, 5), max_new_tokens=4, do_sample=False))


@pytest.mark.needs("transformers")
def test_a_plan_says_how_many_bytes_it_reaches(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    plan = oftfx.plan(model, "all-linear")
    attention = 2 * (2 * 32 * 32 + 2 * 32 * 16)
    experts = 2 * 4 * (2 * 64 * 32 + 64 * 32)
    total = attention + experts + 2 * 4 * 32 + 2 * 100 * 32
    assert (plan.coverage.reached, plan.coverage.total) == (4 * attention, 4 * total)
    assert {u.name.rpartition(".")[2] for u in plan.coverage.unreached} == {"weight", "gate_up_proj", "down_proj"}
    assert "gate_up_proj" in str(plan)
    everything = oftfx.plan(model, {"*": OFT(4)})
    assert everything.coverage.share == 1.0
    assert oftfx.Plan.from_json(everything.to_json()) == everything


def test_a_replica_is_refused_and_threads_are_not():
    model = randomize(oftfx.transform(nn.Sequential(nn.Conv2d(4, 6, 3)), {"*": OFT(6)}), std=0.3).eval()
    replica = model[0]._replicate_for_data_parallel()
    with pytest.raises(OftfxError, match="DistributedDataParallel"):
        replica(torch.randn(1, 4, 5, 5))
    x = torch.randn(1, 4, 5, 5)
    results = []
    with torch.no_grad():
        expected = model(x)

    def run():
        with torch.no_grad():
            results.extend(torch.equal(model(x), expected) for _ in range(100))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 400
    assert not shadows(model)


def over(array):
    """A parameter object of its own over memory in which another one's values stood before."""
    return nn.Parameter(torch.from_numpy(array), requires_grad=False)


@pytest.mark.parametrize("how", ["load_state_dict", "functional_call", "functional_call with tensors"])
def test_a_weight_that_stands_where_another_stood_is_seen(how):
    """Same address, same version, other object: an allocator gives memory out again at once."""
    base = nn.Sequential(nn.Conv2d(4, 6, 3)).eval().requires_grad_(False)
    model = randomize(oftfx.transform(base, {"*": OFT(6)}), std=0.3).eval()
    x, memory = torch.randn(1, 4, 5, 5), base[0].weight.numpy().copy()
    rotation = dense_rotation(model[0].oft.default.skew, 6)
    for seed in range(3):
        memory[...] = torch.randn(memory.shape, generator=torch.Generator().manual_seed(seed)).numpy()
        weight = over(memory)
        with torch.no_grad():
            if how == "load_state_dict":
                model.load_state_dict({"0.weight": weight}, strict=False, assign=True)
                found = model(x)
            else:
                values = {"0.weight": weight if how == "functional_call" else weight.data}
                found = torch.func.functional_call(model, values, (x,))
        turned = (weight.double().flatten(1) @ rotation.T).view(weight.shape)
        assert rel(found, F.conv2d(x.double(), turned, base[0].bias.double())) < 1e-6
        del weight


def test_a_rotated_weight_is_kept_for_its_parameter_only(tmp_path):
    model = randomize(oftfx.transform(nn.Sequential(nn.Conv2d(4, 6, 3)), {"*": OFT(6)}), std=0.3).eval()
    ((_, placement),) = rotated_sites(model)
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        expected = model(x)
        kept = placement._cached
        assert torch.equal(torch.func.functional_call(model, {"0.weight": torch.zeros(6, 4, 3, 3)}, (x,)), zeros(model))
        assert placement._cached is kept  # a call with other values costs the model nothing
        assert torch.equal(model(x), expected)
        assert placement._cached is kept
        torch.save(model, tmp_path / "model")
        again = torch.load(tmp_path / "model", weights_only=False)
        assert next(p for _, p in rotated_sites(again))._cached is None
        assert torch.equal(again(x), expected)


def zeros(model):
    return model[0].bias.detach().view(1, 6, 1, 1).expand(1, 6, 3, 3)


def test_a_base_that_was_made_in_inference_mode_runs():
    with torch.inference_mode():
        base = nn.Sequential(nn.Conv2d(4, 6, 3)).eval()
    model = oftfx.transform(base, {"*": OFT(6)}, inplace=True).eval()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        expected = model(x)
        randomize(model, std=0.3)
        assert rel(model(x), expected) > 1e-2


def test_frozen_blocks_that_stand_where_others_stood_are_seen():
    rotation = FrozenRotation(torch.eye(3).repeat(2, 1, 1))
    memory = rotation.blocks.numpy()
    states = set()
    for _ in range(3):
        rotation.load_state_dict({"blocks": torch.from_numpy(memory)}, assign=True)
        states.add(rotation.state())
        assert rotation.state() in states
    assert len(states) == 3
