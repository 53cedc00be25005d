"""What a file holds besides rotations, against the real PEFT."""

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError
from tests.reference import rel

pytestmark = [
    pytest.mark.needs("peft", "transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
peft = pytest.importorskip("peft")


def saved(base, path, **config):
    theirs = peft.get_peft_model(base, peft.OFTConfig(oft_block_size=8, **config)).eval()
    for name, parameter in theirs.named_parameters():
        if "oft_" in name:
            nn.init.normal_(parameter, std=0.1)
        elif parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(path)
    return theirs


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


TARGETS = ["embed_tokens", "q_proj"]


@pytest.mark.parametrize("again", [False, True], ids=["new", "into an adapter that is there"])
def test_an_embedding_that_peft_rotates_does_not_train_whole(tiny_llama, ids, tmp_path, again):
    theirs = saved(tiny_llama(), tmp_path, target_modules=TARGETS)
    ours = tiny_llama()
    if again:
        ours = oftfx.transform(ours, {"*embed_tokens": OFT(8), "*.q_proj": OFT(8)})
    oftfx.load_adapter(ours, tmp_path, trainable=True)
    assert rel(ours(**ids()).logits, theirs(**ids()).logits) <= 1e-6
    assert len(trainable(ours)) == 3
    assert all(n.endswith(".oft.default.skew") for n in trainable(ours))
    assert oftfx.adapters(ours)["default"].train == ()
    assert sum(p.numel() for p in oftfx.adapter_parameters(ours)) == theirs.get_nb_trainable_parameters()[0]


def test_an_embedding_that_differs_comes_with_the_file_and_does_not_train(tiny_llama, ids, tmp_path):
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.embed_tokens.weight.add_(torch.randn_like(changed.model.embed_tokens.weight))
    theirs = saved(changed, tmp_path / "peft", target_modules=TARGETS)
    expected = theirs(**ids()).logits
    ours = oftfx.load_adapter(tiny_llama(), tmp_path / "peft", trainable=True)
    assert rel(ours(**ids()).logits, expected) <= 1e-6
    assert all(n.endswith(".oft.default.skew") for n in trainable(ours))
    with oftfx.disable_adapters(ours):
        assert torch.equal(ours(**ids()).logits, tiny_llama()(**ids()).logits)
    oftfx.set_adapter(ours, None)
    oftfx.set_adapter(ours, "default")
    assert all(n.endswith(".oft.default.skew") for n in trainable(ours))
    for convention in ("peft", "oftfx"):
        oftfx.save_adapter(ours, tmp_path / convention, convention=convention)
        back = oftfx.load_adapter(tiny_llama(), tmp_path / convention)
        assert rel(back(**ids()).logits, expected) <= 1e-6
        assert oftfx.adapters(back)["default"].brought == ("model.embed_tokens.weight",)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft").eval()
    assert rel(again(**ids()).logits, expected) <= 1e-6


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_the_head_of_a_task_trains_whole_and_travels(ids, tmp_path, task):
    import transformers

    kind = {
        "SEQ_CLS": "SequenceClassification",
        "TOKEN_CLS": "TokenClassification",
        "QUESTION_ANS": "QuestionAnswering",
    }
    head = "qa_outputs" if task == "QUESTION_ANS" else "classifier"
    config = transformers.BertConfig(
        vocab_size=131, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
    )

    def base():
        torch.manual_seed(1)
        return getattr(transformers, f"BertFor{kind[task]}")(config).eval()

    def output(model):
        found = model(**ids())
        return found.start_logits if task == "QUESTION_ANS" else found.logits

    asked = {"target_modules": ["query"], "task_type": task}
    made = oftfx.transform(base(), peft.OFTConfig(oft_block_size=8, **asked))
    theirs = saved(base(), tmp_path / "peft", **asked)
    assert {n for n in trainable(made) if ".oft." not in n} == {f"{head}.weight", f"{head}.bias"}
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]
    ours = oftfx.load_adapter(base(), tmp_path / "peft", trainable=True)
    assert rel(output(ours), output(theirs)) <= 1e-6
    assert trainable(ours) == trainable(made)
    oftfx.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert rel(output(again), output(theirs)) <= 1e-6


def test_a_name_is_the_end_of_a_path_also_in_the_middle_of_a_word(ids):
    """DistilBERT's pre_classifier is new, like its classifier, and PEFT trains both."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    def base():
        torch.manual_seed(0)
        return DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=131, dim=48, n_layers=1, n_heads=4, hidden_dim=64)
        ).eval()

    config = {"oft_block_size": 8, "target_modules": ["q_lin"], "task_type": "SEQ_CLS"}
    ours = oftfx.transform(base(), peft.OFTConfig(**config))
    theirs = peft.get_peft_model(base(), peft.OFTConfig(**config))
    assert oftfx.adapters(ours)["default"].train_modules == ("pre_classifier", "classifier")
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]


def test_a_configuration_that_peft_has_written_into_means_the_same(tiny_bert):
    config = peft.OFTConfig(oft_block_size=8, target_modules="all-linear", task_type="SEQ_CLS")
    fresh = oftfx.plan(tiny_bert(), config)
    theirs = peft.get_peft_model(tiny_bert(), config)
    assert config.modules_to_save == ["classifier", "score"]
    used = oftfx.plan(tiny_bert(), config)
    names = {n.partition(".oft_R.")[0] for n, _ in theirs.named_parameters() if ".oft_R." in n}
    assert {f"base_model.model.{e.fqn}" for e in fresh} == {f"base_model.model.{e.fqn}" for e in used} == names
    assert fresh.train_modules == used.train_modules == ("classifier",)


def test_globs_are_written_as_peft_reads_them(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))

    model = oftfx.transform(base(), {"0": OFT(4)}, train=["*1"])
    assert oftfx.adapters(model)["default"].train_modules == ("1", "2.1")
    for parameter in oftfx.adapter_parameters(model):
        nn.init.normal_(parameter)
    oftfx.save_adapter(model, tmp_path)
    x = torch.randn(3, 8)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert rel(again(x), model(x)) <= 1e-6
    one = oftfx.transform(base(), {"0": OFT(4)}, train=["2.1"])
    oftfx.save_adapter(one, tmp_path)
    # PEFT would also train 2.1 for the name "1".
    other = oftfx.transform(base(), {"0": OFT(4)}, train=["1"])
    assert oftfx.adapters(other)["default"].train_modules == ("1", "2.1")  # ours means last parts, too


def test_a_module_that_peft_would_train_besides_is_named(tmp_path):
    base = nn.ModuleDict({"lin": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "my_norm": nn.LayerNorm(8)})
    model = oftfx.transform(base, {"lin": OFT(4)}, train=["norm"])
    with pytest.raises(AdapterError, match=r"that of my_norm ends with 'norm', so PEFT would train it as well"):
        oftfx.save_adapter(model, tmp_path)
    oftfx.save_adapter(model, tmp_path, convention="oftfx")
    theirs = oftfx.transform(base, peft.OFTConfig(oft_block_size=4, target_modules=["lin"], modules_to_save=["norm"]))
    assert oftfx.adapters(theirs)["default"].train_modules == ("norm", "my_norm")
    oftfx.save_adapter(theirs, tmp_path)
