"""Output errors and perplexity against direct figures in float64 and transformers' own loss."""

import copy
import math

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.folding.measure import measure, see
from tests.reference import randomize, rel


def perturbed(model, std=0.02):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * std)
    return model


def measured(before, after, batches):
    return measure(((see(before, b), see(before, b)) for b in batches), after, batches)


class Several(nn.Module):
    """Outputs of several kinds, nested, with integers among them; dropout in training."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(6, 4), nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        y = self.drop(self.layer(x)) * scale
        return {"y": y, "more": [y.bfloat16(), (y.argmax(-1), None, y.double().sum())]}


def test_the_effect_is_what_the_adapters_do():
    torch.manual_seed(1)
    base, batches = nn.Linear(6, 4), [(torch.randn(n, 6),) for n in (3, 5)]
    unfolded, folded = (perturbed(copy.deepcopy(base), std) for std in (0.1, 0.2))
    result = measure(((see(unfolded, b), see(base, b)) for b in batches), folded, batches)
    x = torch.cat([b[0] for b in batches])
    y0, y, y1 = (m(x).double() for m in (base, unfolded, folded))
    assert result.effect == pytest.approx(rel(y0, y), rel=1e-6)
    assert result.output_error == pytest.approx(rel(y1, y), rel=1e-6)


def test_the_error_is_that_of_all_float_outputs_of_all_batches():
    torch.manual_seed(1)
    before = Several()
    torch.manual_seed(1)
    after = perturbed(Several())
    before.train(), after.train()
    batches = [{"x": torch.randn(n, 6), "scale": s} for n, s in ((3, 1.0), (1, 100.0), (8, 0.5))]
    batches.append((torch.randn(2, 6),))
    result = measured(before, after, batches)
    assert before.training
    assert after.drop.training
    before.eval(), after.eval()
    flat = []
    for model in (before, after):
        outs = [model(**b) if isinstance(b, dict) else model(*b) for b in batches]
        tensors = [t for o in outs for t in (o["y"], o["more"][0], o["more"][1][2])]
        flat.append(torch.cat([t.detach().double().flatten() for t in tensors]))
    assert result.output_error == pytest.approx(rel(flat[1], flat[0]), rel=1e-6)
    assert result.output_error > 1e-3
    assert (result.perplexity_before, result.perplexity_after) == (None, None)
    assert measured(before, before, batches).output_error == 0.0


def test_outputs_of_zeros_and_no_batches():
    before = nn.Linear(3, 2)
    nn.init.zeros_(before.weight)
    nn.init.zeros_(before.bias)
    after = nn.Linear(3, 2)
    batches = [(torch.randn(4, 3),)]
    assert measured(before, before, batches).output_error == 0.0
    assert measured(before, after, batches).output_error == pytest.approx(
        float(after(*batches[0]).detach().norm()), rel=1e-5
    )
    assert measured(before, after, []) is None  # nothing was compared


def padded(ids, left):
    """Two rows of different lengths."""
    batch = ids(3, 12)
    for row, missing in enumerate((0, 4, 7)):
        where = slice(0, missing) if left else slice(12 - missing, 12)
        batch["attention_mask"][row, where] = 0
        batch["input_ids"][row, where] = 0
    return batch


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("padding", ["none", "left", "right", "no mask"])
def test_perplexity_is_the_exponential_of_transformers_own_loss(tiny_llama, ids, padding):
    before, after = tiny_llama(), perturbed(tiny_llama())
    make = {
        "none": lambda s: ids(3, 12, seed=s),
        "left": lambda _: padded(ids, True),
        "right": lambda _: padded(ids, False),
        "no mask": lambda s: {"input_ids": ids(3, 12, seed=s)["input_ids"]},
    }[padding]
    batches = [make(0), make(1), {k: v[:1, :7] for k, v in make(2).items()}]
    result = measured(before, after, batches)
    for model, got in ((before, result.perplexity_before), (after, result.perplexity_after)):
        losses, counts = [], []
        for batch in batches:
            labels = batch["input_ids"].clone()
            if "attention_mask" in batch:
                labels[batch["attention_mask"] == 0] = -100
            counts.append(int((labels[:, 1:] != -100).sum()))
            with torch.no_grad():
                losses.append(float(model(**batch, labels=labels).loss) * counts[-1])
        assert got == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-5)
    assert abs(result.perplexity_after / result.perplexity_before - 1) > 1e-3


@pytest.mark.needs("transformers")
def test_a_folded_models_perplexity_is_in_its_report(tiny_llama, ids):
    model = randomize(oftfx.transform(tiny_llama(), {"all-linear": OFT(16)}), std=0.2)
    batch = padded(ids, True)
    report = oftfx.fold(model, calibration=[batch]).report
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    assert report.measured.perplexity_before == pytest.approx(float(loss.exp()), rel=1e-5)
    assert report.measured.perplexity_after == pytest.approx(float(loss.exp()), rel=1e-4)
    assert f" without adapter, {float(loss.exp()):.1f}" in str(report)
    with torch.no_grad(), oftfx.disable_adapters(model):
        loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    assert report.measured.perplexity_base == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.needs("transformers")
def test_the_adapters_that_are_folded_are_measured_not_the_active_ones(tiny_llama, ids):
    model = oftfx.transform(tiny_llama(), {"all-linear": OFT(16)}, adapter="a")
    oftfx.add_adapter(model, "b", {"all-linear": OFT(16)})
    oftfx.set_adapter(model, ["a", "b"])
    randomize(model, std=0.2)
    oftfx.set_adapter(model, "a")
    report = oftfx.fold(model, adapter="b", calibration=[ids()]).report
    assert report.output_error < 1e-5
    assert oftfx.active_adapters(model) == ("a",)


@pytest.mark.needs("transformers")
def test_encoders_and_inputs_that_are_no_tokens_have_no_perplexity(tiny_bert, tiny_llama, ids):
    bert = tiny_bert()
    result = measured(bert, perturbed(tiny_bert()), [ids()])
    assert (result.perplexity_before, result.perplexity_after) == (None, None)
    assert result.output_error > 0
    llama = tiny_llama()
    embedded = {"inputs_embeds": llama.get_input_embeddings()(ids()["input_ids"]).detach()}
    assert measured(llama, llama, [embedded]).perplexity_before is None
    assert measured(llama, llama, [(ids()["input_ids"],)]).output_error == 0.0
    alone = {k: v[:, :1] for k, v in ids().items()}  # nothing to predict
    assert measured(llama, llama, [alone]).perplexity_before is None


@pytest.mark.needs("transformers")
def test_encoder_decoders_have_no_perplexity(ids):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 131}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    batch = {**ids(), "decoder_input_ids": ids()["input_ids"]}
    result = measured(model, model, [batch])
    assert result.perplexity_before is None
    assert result.output_error == 0.0


def test_a_model_gone_wrong_has_an_infinite_perplexity_not_an_error():
    class Config:
        is_encoder_decoder = False

    class Out(dict):
        @property
        def logits(self):
            return self["logits"]

    class Tokens(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.size, self.config = size, Config()

        def can_generate(self):
            return True

        def forward(self, input_ids):
            wrong = torch.zeros(*input_ids.shape, 5)
            wrong[..., 4] = self.size
            return Out(logits=wrong)

    batch = {"input_ids": torch.tensor([[0, 1, 2, 3]])}
    result = measured(Tokens(0.0), Tokens(1e4), [batch])
    assert result.perplexity_before == pytest.approx(5.0)
    assert result.perplexity_after == math.inf
