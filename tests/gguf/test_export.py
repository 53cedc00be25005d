"""GGUF files, read by the gguf package and by transformers' loader, against the model that they were written from."""

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import ExportError
from tests.ecosystem import published
from tests.gguf.tokenizers import bytes_as_letters, pieces
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("gguf", "transformers")
SIZES = {"vocab_size": 350, "hidden_size": 64, "intermediate_size": 96, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def folded(tiny_llama):
    model = oftfx.transform(tiny_llama(**SIZES, attention_bias=False), {"all-linear": OFT(16)})
    return oftfx.fold(randomize(model)).model


def tensors(path):
    import gguf

    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def test_transformers_reads_the_model_back(folded, ids, tmp_path):
    """Its loader undoes the order of rows, and gives config and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = bytes_as_letters(340)
    steps = []
    report = oftfx.export_gguf(folded, tmp_path / "m.gguf", tokenizer=tokenizer, progress=lambda *s: steps.append(s))
    assert report.lossless
    assert report.types == {"F32": 21}
    assert steps == [(i + 1, 21) for i in range(21)]
    assert report.nbytes == (tmp_path / "m.gguf").stat().st_size
    assert not report.notes
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    for name, value in folded.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again(**ids()).logits, folded(**ids()).logits)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "Grüße, 123 of them"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(("kind", "least", "most"), [("F16", 1e-5, 5e-4), ("BF16", 1e-4, 4e-3), ("Q8_0", 1e-3, 1e-2),
                                                     ("Q4_0", 0.02, 0.15), ("Q4_1", 0.02, 0.15)])  # fmt: skip
def test_each_type_has_the_error_that_is_reported(folded, tmp_path, kind, least, most):
    report = oftfx.export_gguf(folded, tmp_path / "m.gguf", quantized=kind)
    found, weights = tensors(tmp_path / "m.gguf"), folded.state_dict()
    blocks = kind.startswith("Q")
    for tensor in report.tensors:
        outer = tensor.source in ("model.embed_tokens.weight", "lm_head.weight")
        floats = "norm" in tensor.source or (blocks and outer)
        assert tensor.type == found[tensor.name].tensor_type.name == ("F32" if floats else kind)
        assert (tensor.error == 0) if floats else (least < tensor.error < most)
        # The rows of queries and keys are in another order.
        if blocks and not floats and not tensor.source.endswith(("q_proj.weight", "k_proj.weight")):
            got = published.gguf_blocks(found[tensor.name].data, kind)
            assert tensor.error == pytest.approx(rel(got, weights[tensor.source]), rel=1e-5)
    assert not report.lossless
    assert "rounded: relative error up to" in str(report)


def test_halves_stay_halves(folded, tmp_path):
    """A model in bfloat16 is written so; norms are float32 with the same values."""
    report = oftfx.export_gguf(folded.bfloat16(), tmp_path / "m.gguf")
    assert report.lossless
    assert report.types == {"BF16": 16, "F32": 5}
    with pytest.raises(ExportError, match="numbers that F16 does not hold"):
        folded.lm_head.weight.data[0, 0] = 1e6
        oftfx.export_gguf(folded, tmp_path / "m.gguf", quantized="F16")
    assert tensors(tmp_path / "m.gguf")["output.weight"].tensor_type.name == "BF16"  # what was there


@pytest.mark.needs("bitsandbytes")
def test_what_is_no_plain_model_is_refused(folded, tiny_llama, tmp_path):
    from oftfx.demo.smollm import quantize_nf4

    def refuses(model, match, **options):
        with pytest.raises(ExportError, match=match):
            oftfx.export_gguf(model, tmp_path / "m.gguf", **options)
        assert not list(tmp_path.iterdir())

    quantized = quantize_nf4(tiny_llama(**SIZES))
    refuses(quantized, "no type of GGUF holds this layer to the bit. quantized='F32' or 'F16' writes floats")
    adapted = randomize(oftfx.transform(quantized, {"all-linear": OFT(16)}))
    refuses(adapted, r"has adapters .default., which llama.cpp does not know; export oftfx.fold\(model\).model")
    refuses(oftfx.fold(adapted).model, "has a rotation in front of its weight .quantized='keep'")
    refuses(nn.Sequential(nn.Linear(4, 4)), "no GGUF of a Sequential: known are LlamaForCausalLM")
    refuses(folded, "expected None or one of 'F32'", quantized="Q9")
    refuses(tiny_llama(**SIZES | {"intermediate_size": 80}), "down_proj.weight: Q8_0 is of blocks of 32, and it has 80",
            quantized="Q8_0")  # fmt: skip
    refuses(tiny_llama(**SIZES, hidden_act="gelu"), "does not compute activation 'gelu', where it has 'silu'")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    refuses(tiny_llama(**SIZES, rope_parameters=yarn), "does not compute rope_type='yarn'")
    folded.model.layers[0].extra = nn.Linear(4, 4)
    refuses(folded, "layers.0.extra.weight has no place in a GGUF of 'llama'")
    report = oftfx.export_gguf(quantized, tmp_path / "m.gguf", quantized="F32")
    assert report.lossless


def test_a_head_of_its_own_is_refused_where_there_is_none(tmp_path):
    """llama.cpp's Gemma takes the embedding; a fold on the head parts the two."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = SIZES | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, query_pre_attn_scalar=32)).eval()
    oftfx.export_gguf(model, tmp_path / "m.gguf")
    folded = oftfx.fold(randomize(oftfx.transform(model, {"lm_head": OFT(16)}))).model
    with pytest.raises(ExportError, match="and this model has a head of its own"):
        oftfx.export_gguf(folded, tmp_path / "m.gguf")
    model.config.query_pre_attn_scalar = 30
    with pytest.raises(ExportError, match="query_pre_attn_scalar=30 with head_dim=32"):
        oftfx.export_gguf(model, tmp_path / "m.gguf")


def test_tokenizers_that_would_be_another_in_llama_cpp_are_refused(folded, tmp_path):
    from tokenizers import normalizers, pre_tokenizers

    def refuses(tokenizer, match):
        with pytest.raises(ExportError, match=match):
            oftfx.export_gguf(folded, tmp_path / "m.gguf", tokenizer=tokenizer)

    refuses(bytes_as_letters(360), "it has tokens up to 359, and the model has 350")
    refuses(pieces(350, closed=False), "as llama.cpp would")
    other = bytes_as_letters(340)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    refuses(other, "cuts words by Whitespace")
    other = bytes_as_letters(340)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    refuses(other, "it normalizes text by Lowercase")
    other.backend_tokenizer.normalizer = normalizers.NFC()
    report = oftfx.export_gguf(folded, tmp_path / "m.gguf", tokenizer=other)
    assert report.notes == ("llama.cpp does not compose Unicode (NFC) as this tokenizer does",)
    refuses(tmp_path / "nowhere", "has none that transformers reads")


@pytest.mark.needs("gptqmodel")
@pytest.mark.parametrize(("settings", "kind"), [
    ({"sym": True, "group_size": 64}, "Q4_0"), ({"sym": False, "group_size": 32}, "Q8_0"),
])  # fmt: skip
def test_integers_keep_their_codes_and_scales(settings, kind, tmp_path):
    """Symmetric groups of 4 bits are Q4_0; zeros between are exact in Q8_0, whose levels reach further."""
    from oftfx.formats.gptq import make_gptq
    from oftfx.formats.registry import format_of
    from oftfx.gguf.encode import quantized_matrix

    layer = make_gptq(nn.Linear(192, 80), **settings)
    weight_format = format_of(layer)
    made = quantized_matrix("layer", layer, weight_format, None)
    assert made.type == kind
    coded = weight_format.codes(layer)
    zeros = coded.zero if coded.zero is not None else torch.full_like(coded.scale, weight_format.grid(layer).zero)
    groups = coded.codes.unflatten(1, (-1, settings["group_size"])).double()
    exact = (groups - zeros.double().view(80, -1, 1)) * coded.scale.double().view(80, -1, 1)
    got = published.gguf_blocks(made.data, kind)
    assert torch.equal(got.double(), exact.flatten(1))
    # gptqmodel rounds each product to float16, which is all of the error that is told.
    assert made.error == pytest.approx(rel(got, weight_format.dequantize(layer)), rel=1e-6)
    assert made.error < 3e-4
    asked = quantized_matrix("layer", layer, weight_format, "Q4_1")
    assert asked.type == "Q4_1"
    assert made.error <= asked.error < 3e-3
