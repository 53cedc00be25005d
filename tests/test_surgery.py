import copy
import io

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, OftfxWarning, RuleError
from tests.reference import dense_rotation, randomize, rel

pytestmark = pytest.mark.needs("transformers")


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_identity_is_exact_and_base_keys_stay(tiny_llama, ids, share, training):
    base = tiny_llama().train(training)
    model = oftfx.transform(base, {"all-linear": OFT(16, share_input=share)})
    assert type(model) is type(base)
    assert torch.equal(model(**ids()).logits, base(**ids()).logits)
    assert set(base.state_dict()) < set(model.state_dict())
    new = set(model.state_dict()) - set(base.state_dict())
    assert all(k.endswith(".oft.default.skew") for k in new)
    assert len(new) == (8 if share else 14)
    model.load_state_dict(base.state_dict(), strict=False)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_identity_is_exact_in_every_dtype(tiny_llama, ids, dtype):
    base = tiny_llama().to(dtype)
    model = oftfx.transform(base, {"all-linear": OFT(32)})
    assert torch.equal(model(**ids()).logits, base(**ids()).logits)
    skew = next(iter(oftfx.adapter_parameters(model)))
    assert skew.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_input_is_not_changed_and_shares_all_memory(tiny_llama, ids):
    base = tiny_llama()
    names = [n for n, _ in base.named_modules()]
    model = oftfx.transform(base, {"all-linear": OFT(16)})
    assert [n for n, _ in base.named_modules()] == names
    assert not any(m._forward_pre_hooks for m in base.modules())
    assert all(p.requires_grad for p in base.parameters())
    own = dict(model.named_parameters())
    assert all(own[n].data_ptr() == p.data_ptr() for n, p in base.named_parameters())
    randomize(model)
    assert rel(model(**ids()).logits, base(**ids()).logits) > 1e-2


def test_inplace_changes_the_model_itself(tiny_llama):
    base = tiny_llama()
    assert oftfx.transform(base, {"*.q_proj": OFT(16)}, inplace=True) is base
    assert [n for n, p in base.named_parameters() if p.requires_grad] == [
        f"model.layers.{i}.self_attn.q_proj.oft.default.skew" for i in range(2)
    ]


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(
    "spec",
    [
        OFT(8),
        OFT(16, parameterization="cayley"),
        OFT(8, block_share=True),
        OFT(blocks=2, terms=7),
        OFT(8, share_input=True),
    ],
)
def test_forward_and_gradients_equal_explicitly_rotated_weights(request, ids, kind, spec):
    base = request.getfixturevalue(f"tiny_{kind}")().double()
    model = randomize(oftfx.transform(base, {"all-linear": spec}))
    reference = copy.deepcopy(base)
    leaves = {}
    for entry in oftfx.adapters(model)["default"]:
        skew = model.get_submodule(entry.owner).oft.default.skew
        rotation = dense_rotation(
            skew.detach(),
            entry.block_size,
            entry.blocks,
            parameterization=spec.parameterization,
            terms=spec.terms,
        ).requires_grad_()
        layer = reference.get_submodule(entry.fqn)
        weight = layer.weight.detach() @ rotation.T
        del layer._parameters["weight"]
        layer.weight = weight
        leaves[entry.fqn] = (skew, rotation, entry)
    out, expected = model(**ids()).logits, reference(**ids()).logits
    assert rel(out, expected) < 1e-12
    out.square().sum().backward()
    expected.square().sum().backward()
    assert all((".oft." in n) == (p.grad is not None) for n, p in model.named_parameters())
    # Chain rule by hand: directional derivative of the loss along a random direction of one skew.
    fqn, (skew, _, entry) = next(iter(leaves.items()))
    sharing = [r for _, r, e in leaves.values() if e.owner == entry.owner]
    direction, h = torch.randn(skew.shape, dtype=torch.float64), 1e-6
    moved = [
        dense_rotation(
            skew.detach() + s * h * direction, entry.block_size, entry.blocks,
            parameterization=spec.parameterization, terms=spec.terms,
        )
        for s in (1, -1)
    ]  # fmt: skip
    tangent = (moved[0] - moved[1]) / (2 * h)
    assert float((skew.grad * direction).sum()) == pytest.approx(
        sum(float((r.grad * tangent).sum()) for r in sharing), rel=1e-5
    ), fqn


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (2, 3, 4, 7), (0, 7)])
def test_linear_takes_inputs_of_any_rank(shape):
    base = nn.Sequential(nn.Linear(7, 5))
    model = randomize(oftfx.transform(base, {"0": OFT(7)}))
    x = torch.randn(shape)
    expected = x.double() @ dense_rotation(model[0].oft.default.skew, 7) @ base[0].weight.double().T + base[0].bias
    assert model(x).shape == expected.shape
    assert torch.allclose(model(x).double(), expected, atol=1e-6)
    assert torch.equal(model[0](input=x), model(x))


def test_generate_gives_the_same_tokens_cached_uncached_and_folded(tiny_llama, ids):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16)}), std=0.1)
    folded = oftfx.fold(model).model
    prompt = ids(2, 4)
    run = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**prompt, **run)
    assert torch.equal(model.generate(**prompt, **run, use_cache=False), expected)
    assert torch.equal(folded.generate(**prompt, **run), expected)
    with oftfx.disable_adapters(model):
        assert not torch.equal(model.generate(**prompt, **run), expected)


def test_hf_trainer_changes_only_the_skews(tiny_llama, ids, tmp_path):
    from transformers import Trainer, TrainingArguments

    base = tiny_llama()
    model = oftfx.transform(base, {"all-linear": OFT(16)})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = [
        {**{k: v[0] for k, v in ids(1, 9, seed=i).items()}, "labels": ids(1, 9, seed=i)["input_ids"][0]}
        for i in range(20)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if ".oft." in k}
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())


def test_deepcopy_and_pickle_are_independent(tiny_llama, ids):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16, share_input=True)}))
    expected = model(**ids()).logits
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(other(**ids()).logits, expected)
        randomize(other, seed=5)
        assert rel(other(**ids()).logits, expected) > 1e-3
        assert torch.equal(model(**ids()).logits, expected)
        assert rel(oftfx.fold(other).model(**ids()).logits, other(**ids()).logits) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_llama, ids, reentrant):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16, share_input=True)})).train()
    batch = {**ids(), "labels": ids()["input_ids"], "use_cache": False}

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients()
    assert got.keys() == expected.keys()
    assert all(rel(got[n], expected[n]) < 1e-6 for n in got)


def test_save_pretrained_of_a_folded_model_loads_as_a_plain_one(tiny_llama, ids, tmp_path):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16)}))
    folded = oftfx.fold(model).model
    folded.save_pretrained(tmp_path)
    again = type(folded).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**ids()).logits, folded(**ids()).logits)


def test_compiled_models_compute_the_same(tiny_llama, ids):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16, share_input=True)}))
    expected = model(**ids()).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert rel(compiled(**ids()).logits, expected) < 1e-6
    model.train()
    loss = compiled(**ids(), labels=ids()["input_ids"]).loss
    loss.backward()
    got = [p.grad.clone() for p in oftfx.adapter_parameters(model)]
    model.zero_grad()
    model(**ids(), labels=ids()["input_ids"]).loss.backward()
    assert all(rel(g, p.grad) < 1e-5 for g, p in zip(got, oftfx.adapter_parameters(model), strict=True))


def test_autocast_trains(tiny_llama, ids):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16, share_input=True)})).train()
    exact = model(**ids()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**ids()).logits
    assert 1e-4 < rel(out, exact) < 3e-2
    out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in oftfx.adapter_parameters(model))


def test_train_copies_what_trains_whole(tiny_llama, ids):
    base = tiny_llama(tie_word_embeddings=True)
    model = oftfx.transform(base, {"*.q_proj": OFT(16)}, train=["norm"], train_bias="oft")
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".oft." not in n]
    assert trained == [*(f"model.layers.{i}.self_attn.q_proj.bias" for i in range(2)), "model.norm.weight"]
    assert torch.equal(model(**ids()).logits, base(**ids()).logits)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert rel(model(**ids()).logits, base(**ids()).logits) > 0.1
    with oftfx.disable_adapters(model):
        assert torch.equal(model(**ids()).logits, base(**ids()).logits)
    folded = oftfx.fold(model).model
    assert torch.equal(folded(**ids()).logits, model(**ids()).logits)
    assert not any(p.requires_grad for p in folded.parameters())


def test_tied_parameters_that_train_whole_stay_tied(tiny_llama):
    model = oftfx.transform(tiny_llama(tie_word_embeddings=True), {"*.q_proj": OFT(16)}, train=["lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad


def test_faults_are_found_before_anything_changes(tiny_llama, ids):
    base = tiny_llama()
    for call, message in [
        (lambda: oftfx.transform(base, {"*.q_prj": OFT(16)}, inplace=True), r"Nearest: \*\.q_proj"),
        (
            lambda: oftfx.transform(base, {"all-linear": OFT(64)}, inplace=True),
            "block_size 64 does not divide in_features 96",
        ),
        (lambda: oftfx.transform(base, {"all-linear": None}, inplace=True), "no site is left"),
        (lambda: oftfx.transform(base, "all-linear", emit="onnx", inplace=True), "emit: got 'onnx'"),
    ]:
        with pytest.raises(RuleError, match=message):
            call()
    with pytest.raises(AdapterError, match=r"adapter name 'a\.b'"):
        oftfx.transform(base, "all-linear", adapter="a.b", inplace=True)
    with pytest.raises(AdapterError, match="adapter name 'train'"):
        oftfx.transform(base, "all-linear", adapter="train", inplace=True)
    assert not any(m._forward_pre_hooks for m in base.modules())
    assert all(p.requires_grad for p in base.parameters())
    model = oftfx.transform(base, {"*.q_proj": OFT(16)})
    with pytest.raises(AdapterError, match="already has an adapter 'default'"):
        oftfx.transform(model, {"*.q_proj": OFT(16)})


def test_a_second_transform_adds_an_adapter(tiny_llama, ids):
    first = randomize(oftfx.transform(tiny_llama(), {"*.q_proj": OFT(16)}, adapter="a"))
    expected = first(**ids()).logits
    both = oftfx.transform(first, {"*.v_proj": OFT(8)}, adapter="b")
    assert list(oftfx.adapters(both)) == ["a", "b"]
    assert oftfx.active_adapters(both) == ("b",)
    oftfx.set_adapter(both, "a")
    assert torch.equal(both(**ids()).logits, expected)
    assert list(oftfx.adapters(first)) == ["a"]


def test_a_peft_config_as_rules_selects_pefts_sites(tiny_llama):
    peft = pytest.importorskip("peft")
    cases = [
        {"target_modules": ["q_proj", "up_proj"], "oft_block_size": 16},
        {"target_modules": r".*layers\.1.*(k|v)_proj", "oft_block_size": 8},
        {"target_modules": "all-linear", "oft_block_size": 0, "r": 4},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"], "oft_block_size": 16},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*", "oft_block_size": 16},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "oft_block_size": 16, "block_share": True},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": 0,
            "layers_pattern": "layers",
            "oft_block_size": 16,
        },
        {"target_modules": ["down_proj"], "oft_block_size": 40, "coft": True, "eps": 0.1},
        {
            "target_modules": ["q_proj"],
            "oft_block_size": 16,
            "bias": "oft_only",
            "modules_to_save": ["lm_head"],
        },
    ]
    for case in cases:
        config = peft.OFTConfig(**case)
        model = oftfx.transform(tiny_llama(), config)
        with pytest.warns(UserWarning) if case["oft_block_size"] == 40 else _nothing():
            theirs = peft.get_peft_model(tiny_llama(), config)
        expected = {
            n.removeprefix("base_model.model.").replace(".oft_R.default.weight", ""): tuple(p.shape)
            for n, p in theirs.named_parameters()
            if ".oft_R." in n
        }
        got = {n.removesuffix(".oft.default.skew"): tuple(p.shape) for n, p in model.named_parameters() if ".oft." in n}
        assert got == expected, case
        whole = [n for n, p in theirs.named_parameters() if p.requires_grad and ".oft_R." not in n]
        assert len(whole) == sum(p.requires_grad and ".oft." not in n for n, p in model.named_parameters())
    with pytest.warns(OftfxWarning, match=r"fan_in_fan_out=True, but model\.layers\.0\.self_attn\.q_proj is a Linear"):
        oftfx.plan(tiny_llama(), peft.OFTConfig(target_modules=["q_proj"], fan_in_fan_out=True))
    with pytest.raises(RuleError, match="type LORA"):
        oftfx.plan(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))


def _nothing():
    import contextlib

    return contextlib.nullcontext()
