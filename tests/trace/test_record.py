import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx import OFT
from oftfx.errors import GuardError, TraceError
from oftfx.trace.record import record, record_best
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("transformers")


def arch(name):
    """Tiny random models of different families, with inputs."""
    import transformers as tf

    small = {
        "vocab_size": 131,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    causal = {**small, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    return {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**causal)),
        "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**causal, head_dim=8)),
        "gemma2": lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(**causal, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
        ),
        "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**causal)),
        "mixtral": lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**causal, num_local_experts=4, num_experts_per_tok=2)
        ),
        "bert": lambda: tf.BertModel(tf.BertConfig(**small, **quiet)),
        "deberta": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**small, **quiet, relative_attention=True)),
        "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**small)),
        "bart": lambda: tf.BartModel(
            tf.BartConfig(
                vocab_size=131, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, decoder_start_token_id=1,
            )
        ),
    }[name]().eval()  # fmt: skip


ARCHITECTURES = ["llama", "qwen3", "gemma2", "phi3", "mixtral", "bert", "deberta", "gpt_neox", "bart"]


def leaves(out):
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recorded_graph_equals_the_model_also_at_other_sizes(name, ids):
    model = arch(name)
    graph = oftfx.graph(model, ids())
    assert list(graph.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(graph.parameters(), model.parameters(), strict=True))
    called = {n.target for n in graph.graph.nodes if n.op == "call_module"}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears <= called
    for inputs in (ids(), ids(3, 7, seed=1)):
        with torch.no_grad():
            plain = {} if name in ("bert", "deberta") else {"use_cache": False}
            expected, got = model(**inputs, **plain), graph(**inputs)
        assert type(got) is type(expected)
        for a, b in zip(leaves(expected), leaves(got), strict=True):
            assert rel(b, a) < 1e-6


def test_the_graph_of_a_transformed_model_has_the_rotations_as_nodes(tiny_llama, ids):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16, share_input=True)}))
    graph = oftfx.graph(model, ids())
    functions = [n.target.__name__ for n in graph.graph.nodes if n.op == "call_function"]
    assert functions.count("cayley") == functions.count("rotate") == 2 * 4  # q/k/v, o, gate/up, down
    model.zero_grad()
    graph(**ids()).logits.square().sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**ids()).logits.square().sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    assert all(".oft." in n for n in got)
    for name in got:
        assert rel(got[name], expected[name]) < 1e-5


def test_emit_graph_equals_emit_modules(tiny_llama, ids):
    base = tiny_llama()
    graph = oftfx.transform(base, {"*.q_proj": OFT(8)}, emit="graph", example_inputs=ids())
    modules = oftfx.transform(base, {"*.q_proj": OFT(8)})
    names = [n for n, p in graph.named_parameters() if p.requires_grad]
    assert names == [n for n, p in modules.named_parameters() if p.requires_grad]
    modules.load_state_dict(randomize(graph).state_dict())
    with torch.no_grad():
        assert rel(graph(**ids(3, 5)).logits, modules(**ids(3, 5)).logits) < 1e-6
    optimizer = torch.optim.SGD([p for p in graph.parameters() if p.requires_grad], lr=0.1)
    before = graph(**ids()).logits.detach()
    graph(**ids()).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(graph(**ids()).logits, before)


def test_guards(tiny_llama, ids):
    graph = oftfx.graph(tiny_llama(), ids())
    with pytest.raises(GuardError, match="labels"):
        graph(**ids(), labels=ids()["input_ids"])
    with pytest.raises(GuardError, match="missing a required argument: 'attention_mask'"):
        graph(input_ids=ids()["input_ids"])
    with pytest.raises(GuardError, match=r"input_ids: got torch\.float32, recorded for torch\.int64"):
        graph(**{**ids(), "input_ids": torch.randn(2, 11)})
    with pytest.raises(GuardError, match=r"shape \(22,\), recorded for shape \(\*, \*\)"):
        graph(**{**ids(), "input_ids": ids()["input_ids"].flatten()})
    with pytest.raises(GuardError, match="sizes"):
        graph(input_ids=ids(2, 11)["input_ids"], attention_mask=ids(2, 9)["attention_mask"])


class Branchy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_a_branch_on_data_is_never_baked_into_a_graph():
    model, x = Branchy(), torch.ones(3, 6)
    recording = record_best(model, (x,))
    assert recording.rung == "analysis"
    assert "fake values" in recording.reason
    assert "depends on data" in recording.reason
    with pytest.raises(TraceError, match="cannot be recorded on fake tensors"):
        oftfx.graph(model, (x,))
    plan = oftfx.plan(model, {"all-linear": OFT(3)}, example_inputs=(x,))
    assert plan.trace.rung == "analysis"
    assert plan.trace.never_called == ("b",)


def test_real_recording_leaves_model_and_random_state_alone():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), Branchy())
    model[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    assert record_best(model, (torch.randn(4, 6).clone(),)).rung == "analysis"
    torch.set_rng_state(state)
    record_best(model, (torch.ones(4, 6),))
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_last_rung_gives_the_reason():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            raise ValueError("needs a mouse")

    recording = record_best(Broken(), (torch.ones(3, 6),))
    assert recording.rung == "tree"
    assert "needs a mouse" in recording.reason


class Residual(nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.a, self.drop, self.functional = nn.Linear(6, 6), nn.Dropout(0.5), functional

    def forward(self, x):
        y = F.dropout(x, 0.5, self.training) if self.functional else self.drop(x)
        return self.a(x + y)


def test_a_residual_around_dropout_reads_its_input():
    model, x = Residual(functional=False).eval(), torch.randn(4, 6)
    graph = oftfx.graph(model, (x,))
    graph.train()
    torch.manual_seed(3)
    got = graph(x)
    torch.manual_seed(3)
    assert torch.equal(got, model.train()(x))


def test_a_mode_that_was_baked_in_is_guarded():
    model, x = Residual(functional=True).eval(), torch.randn(4, 6)
    graph = oftfx.graph(model, (x,))
    assert torch.equal(graph(x), model(x))
    graph.train()
    with pytest.raises(GuardError, match="mode: got training, recorded for eval"):
        graph(x)
    assert not model.training  # the graph's mode is its own


class Ops(nn.Module):
    """Views, in-place writes, sizes in arithmetic, attributes, nested inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(4))
        self.table = torch.arange(4.0)

    def forward(self, pair, flag=True, *, mask=None):
        x, (y, _) = pair["x"], pair["rest"]
        z = self.a(x) * self.scale + self.table
        z = z.reshape(x.shape[0] * x.shape[1], -1).unflatten(0, (x.shape[0], -1)).mT.mT
        z[..., 0] = 2 * y.shape[-1]
        z += 1 if mask is None else mask[..., None]
        return {"z": z / max(x.shape[0], 1), "list": [z.sum(-1), None], "n": 3}


def test_ordinary_python_is_recorded():
    model = Ops()
    inputs = {"pair": {"x": torch.randn(3, 5, 6), "rest": (torch.randn(2, 7), 1)}, "mask": torch.randn(3, 5)}
    graph = oftfx.graph(model, inputs)
    other = {"pair": {"x": torch.randn(2, 4, 6), "rest": (torch.randn(2, 9), 1)}, "mask": torch.randn(2, 4)}
    for batch in (inputs, other):
        expected, got = model(**batch), graph(**batch)
        assert torch.equal(got["z"], expected["z"])
        assert torch.equal(got["list"][0], expected["list"][0])
        assert got["n"] == 3


def test_sizes_of_one_are_fixed_and_guarded():
    graph = oftfx.graph(Residual(False).eval(), (torch.randn(1, 6),))
    with pytest.raises(GuardError, match=r"shape \(2, 6\), recorded for shape \(1, "):
        graph(torch.randn(2, 6))


def test_recording_is_fast_and_small_on_the_meta_device():
    import resource

    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=12, num_attention_heads=32)
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recording = record(model, {"input_ids": torch.zeros(2, 9, dtype=torch.long, device="meta")})
    assert recording.rung == "graph"
    assert len([c for c in recording.calls if c.endswith("_proj")]) == 12 * 7
    assert recording.seconds < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB; the weights would be 12 GB


def test_a_copy_of_a_graph_is_whole_and_independent(tiny_llama, ids):
    import copy

    model = oftfx.transform(tiny_llama(tie_word_embeddings=True), {"*.q_proj": OFT(8)})
    graph = oftfx.graph(model, ids())
    other = copy.deepcopy(graph)
    assert list(other.state_dict()) == list(model.state_dict())
    assert other.lm_head.weight is other.model.embed_tokens.weight
    randomize(other)
    assert rel(other(**ids()).logits, model(**ids()).logits) > 1e-3
    assert torch.equal(graph(**ids()).logits, model(**ids()).logits)
    folded = oftfx.fold(other).model
    assert rel(folded(**ids()).logits, other(**ids()).logits) < 1e-5


class Lazy(nn.Module):
    """Makes a mask on first use, counts its calls and moves a buffer, as many models do."""

    def __init__(self):
        super().__init__()
        self.a, self.mask, self.calls, self.seen = nn.Linear(6, 6), None, 0, []
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones(x.shape[0], 1)
            self.a.register_forward_hook(lambda module, args, out: self.seen.append(out))
        self.calls += 1
        self.mean = self.mean * 0.9 + x.mean(0)
        return self.norm(self.a(x * self.mask))


@pytest.mark.parametrize("fake", [True, False])
def test_recording_leaves_no_trace_in_the_model(fake):
    model = Lazy().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    record(model, (torch.randn(4, 6),), fake=fake)
    assert model.mask is None
    assert model.calls == 0
    assert model.seen == []
    assert not model.a._forward_hooks
    assert type(model.mean) is torch.Tensor
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model(torch.randn(4, 6))) is torch.Tensor


def test_the_length_of_a_container_is_guarded():
    class Total(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, xs, scale=2.0):
            return scale * sum(self.a(x) for x in xs) / len(xs)

    model, xs = Total(), [torch.randn(3, 6), torch.randn(3, 6)]
    graph = oftfx.graph(model, {"xs": xs, "scale": 2.0})
    assert torch.equal(graph(xs), model(xs))
    with pytest.raises(GuardError, match="xs: got the structure"):
        graph([*xs, torch.randn(3, 6)])
    with pytest.raises(GuardError, match=r"scale: got 3\.0, recorded for 2\.0"):
        graph(xs, scale=3.0)


def test_a_constant_before_a_tensor_is_an_argument_without_default():
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 4)

        def forward(self, double, x, shift=0.0):
            return self.a(x) * (2 if double else 1) + shift

    model, x = Flagged(), torch.randn(3, 6)
    for inputs in ({"double": True, "x": x}, (True, x)):
        graph = oftfx.graph(model, inputs)
        assert torch.equal(graph(True, x), model(True, x))
        with pytest.raises(GuardError, match="double: got False, recorded for True"):
            graph(False, x)


def test_a_miss_goes_to_the_model_where_that_is_asked_for(ids):
    model = randomize(oftfx.transform(arch("llama"), {"all-linear": oftfx.OFT(16)}))
    graph = oftfx.graph(model, ids(), on_miss="eager")
    assert torch.equal(graph(**ids(3, 7)).logits, model(**ids(3, 7)).logits)
    batch = {**ids(), "labels": ids()["input_ids"]}
    with pytest.raises(GuardError):
        oftfx.graph(model, ids())(**batch)
    assert torch.equal(graph(**batch).loss, model(**batch).loss)
    assert copy.deepcopy(graph).on_miss == "eager"
    with pytest.raises(oftfx.errors.RuleError, match="on_miss"):
        oftfx.graph(model, ids(), on_miss="ignore")


def test_a_miss_leaves_parts_in_the_mode_they_are_in():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x, scale=None):
            y = self.norm(self.linear(x))
            return y if scale is None else y * scale

    model = oftfx.transform(Frozen(), {"linear": oftfx.OFT(4)}).train()
    model.norm.eval()
    x = torch.randn(5, 8) + 3
    graph = oftfx.graph(model, (x,), on_miss="eager")
    before, expected = model.norm.running_mean.clone(), model(x, 2.0)
    assert torch.equal(graph(x, 2.0), expected)
    assert (model.training, model.norm.training) == (True, False)
    assert torch.equal(model.norm.running_mean, before)
    graph.eval()  # a graph in another mode still means the whole model
    assert torch.equal(graph(x, 2.0), expected)
    assert not model.training
