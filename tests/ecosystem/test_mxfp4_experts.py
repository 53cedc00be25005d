"""gpt-oss: its 4-bit experts are read as floats, and a fold of these is a checkpoint that transformers reads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import oftfx
from oftfx import OFT
from oftfx.errors import FoldError
from oftfx.formats.mxfp4_experts import codes_of
from oftfx.formats.packing.float4_codes import from_exponents, from_nibbles, to_exponents, to_nibbles
from oftfx.grids import Float4, Grid, Partition
from oftfx.placement.find import rotated_sites
from tests.reference import dense_rotation, randomize, rel

pytestmark = [pytest.mark.needs("transformers", "accelerate"), pytest.mark.filterwarnings("ignore:.*kernels.*")]

NAMES = ("gate_up_proj", "down_proj")


def packed(weight):
    """Blocks and scales of experts ``(experts, in, out)``, as the published checkpoints have them."""
    experts, inner, outer = weight.shape
    rows = weight.transpose(1, 2).reshape(-1, inner)
    grid = Grid(Partition.tiles(tuple(rows.shape), (1, 32)), Float4(), round_scale=lambda s: 2.0 ** s.log2().ceil())
    coded = grid.fit(rows)
    blocks = to_nibbles(coded.codes).view(experts, outer, inner // 32, 16)
    return blocks, to_exponents(coded.scale).view(experts, outer, inner // 32), grid.values(coded)


@pytest.fixture
def written(tmp_path):
    """A tiny checkpoint, and the values of its experts ``(experts, out, in)``."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"],
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors, values = load_file(file), {}
    for name in NAMES:
        path = f"model.layers.0.mlp.experts.{name}"
        weight = tensors.pop(path)
        tensors[f"{path}_blocks"], tensors[f"{path}_scales"], found = packed(weight)
        values[path] = found.view(len(weight), -1, weight.shape[1])
    save_file(tensors, file, metadata={"format": "pt"})
    note = json.loads((tmp_path / "base" / "config.json").read_text())
    note["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": None}
    (tmp_path / "base" / "config.json").write_text(json.dumps(note))
    return tmp_path / "base", values


def test_read_as_floats_folded_and_written(written, ids, tmp_path):
    from transformers import GptOssForCausalLM, Mxfp4Config

    path, values = written
    tensors = load_file(path / "model.safetensors")
    base = GptOssForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()
    for name, wanted in values.items():
        assert torch.equal(base.get_parameter(name).transpose(1, 2), wanted)
        scale = from_exponents(tensors[f"{name}_scales"]).unsqueeze(-1)
        read = Float4().decode(from_nibbles(tensors[f"{name}_blocks"])) * scale
        assert torch.equal(read.flatten(2), wanted)
    model = randomize(oftfx.transform(base, {"*.experts.*_proj": OFT(16), "*.q_proj": OFT(16)}), std=0.2)
    result = oftfx.fold(model)
    assert [s.action for s in result.report] == ["folded"] * 3
    with torch.no_grad():
        wanted = model(**ids()).logits
        assert rel(result.model(**ids()).logits, wanted) < 5e-6
        assert rel(base(**ids()).logits, wanted) > 1e-2
        again = oftfx.load_folded(result.save(tmp_path / "folded"), dtype=torch.float32)
        assert torch.equal(again(**ids()).logits, result.model(**ids()).logits)
    assert not any(n.endswith(("_blocks", "_scales")) for n in load_file(tmp_path / "folded" / "model.safetensors"))


def tensors_of(path):
    return load_file(path / "model.safetensors")


def read(path, **options):
    from transformers import GptOssForCausalLM, Mxfp4Config

    known = {"dtype": torch.bfloat16, "quantization_config": Mxfp4Config(dequantize=True), **options}
    return GptOssForCausalLM.from_pretrained(path, **known).eval()


@pytest.mark.parametrize("rules", [{"*.experts.*_proj": OFT(16)}, {"*.down_proj": OFT(16, experts="each")}], ids=str)
def test_rounded_to_mxfp4_and_written_as_it_was(rules, written, ids, tmp_path):
    """Every number of the file is that of a fold in float64 to half a step; transformers reads what was folded."""
    path, values = written
    model = randomize(oftfx.transform(read(path), {**rules, "*.q_proj": OFT(16)}), std=0.05)
    result = oftfx.fold(model, quantized="requantize")
    formats = {s.fqn.rpartition(".")[2]: (s.format, s.action) for s in result.report}
    assert formats.pop("q_proj") == ("dense", "folded")
    assert set(formats.values()) == {("mxfp4", "requantized")}
    assert all(0.03 < s.relative_error < 0.2 for s in result.report if s.format == "mxfp4")
    result.save(tmp_path / "folded")
    base, folded = tensors_of(path), tensors_of(tmp_path / "folded")
    assert {k: (v.shape, v.dtype) for k, v in folded.items() if "experts" in k and "bias" not in k} == {
        k: (v.shape, v.dtype) for k, v in base.items() if "experts" in k and "bias" not in k
    }
    sites = dict(rotated_sites(model))
    for name, weight in values.items():
        found = decoded(folded, name)
        if name not in sites:
            assert torch.equal(found, weight)
            continue
        skew = sites[name].rotations["default"].skew.detach()
        each = skew.view(len(weight), -1, skew.shape[1]) if sites[name].each else [skew] * len(weight)
        wanted = torch.stack([w.double() @ dense_rotation(s, 16).T for w, s in zip(weight, each, strict=True)])
        assert rel(found, wanted) < 0.15
        largest = wanted.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
        missed = (found - wanted).unflatten(-1, (-1, 32)).abs()
        assert bool((missed <= largest / 3).all())  # the widest step is a third of the largest level
    with torch.no_grad():
        expected = result.model(**ids()).logits
        assert torch.equal(read(tmp_path / "folded")(**ids()).logits, expected)
        assert torch.equal(oftfx.load_folded(tmp_path / "folded", dtype=torch.bfloat16)(**ids()).logits, expected)
    assert getattr(result.model.config, "quantization_config", None) is None


@pytest.mark.parametrize("experts", ["shared", "each"])
def test_calibrated_one_by_one(experts, written, tmp_path):
    """Each expert for its own rows; the file's numbers, read by the published layout, give outputs that are nearer."""
    path, values = written
    model = randomize(oftfx.transform(read(path), {"*.experts.*_proj": OFT(16, experts=experts)}), std=0.05)
    generator = torch.Generator().manual_seed(5)
    texts = [{"input_ids": torch.randint(131, (4, 32), generator=generator)} for _ in range(17)]
    with torch.no_grad():
        wanted = model(**texts[0]).logits
        plain = oftfx.fold(model, quantized="requantize").model(**texts[0]).logits
        result = oftfx.fold(model, quantized="calibrate", calibration=texts[1:])
        found = result.model(**texts[0]).logits
    assert {(s.format, s.action) for s in result.report} == {("mxfp4", "calibrated")}
    assert rel(found, wanted) < 0.7 * rel(plain, wanted)
    result.save(tmp_path / "folded")
    folded = tensors_of(tmp_path / "folded")
    for name in values:
        stored = result.model.get_parameter(name).detach().transpose(1, 2)
        assert torch.equal(decoded(folded, name).to(stored.dtype), stored)


def decoded(tensors, name):
    """By the published layout: the low four bits first, scales by powers of two."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    blocks, scales = tensors[f"{name}_blocks"].long(), tensors[f"{name}_scales"].double()
    values = torch.stack([levels[blocks % 16], levels[blocks // 16]], -1).flatten(-2)
    return (values * 2.0 ** (scales - 127).unsqueeze(-1)).flatten(2)


def test_what_is_not_turned_is_written_with_the_same_values(written, tmp_path):
    path, values = written
    model = oftfx.transform(read(path), {"*.experts.*_proj": OFT(16)})  # the identity
    result = oftfx.fold(model, quantized="requantize")
    assert {s.action for s in result.report} == {"untouched"}
    result.save(tmp_path / "folded")
    assert all(torch.equal(decoded(tensors_of(tmp_path / "folded"), n), v.double()) for n, v in values.items())


def test_experts_of_two_kinds_have_no_place(written, tmp_path):
    path, _ = written
    model = randomize(oftfx.transform(read(path), {"*.experts.*_proj": OFT(16)}), std=0.05)
    result = oftfx.fold(model, quantized=lambda site: "requantize" if "down" in site.fqn else "float")
    with pytest.raises(FoldError, match=r"gate_up_proj has values that MXFP4 does not"):
        result.save(tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_floats_that_nobody_rounded_stay_floats(written):
    path, _ = written
    base = read(path)
    with torch.no_grad():
        base.model.layers[0].mlp.experts.down_proj[1, 7, 5] *= 1.01
    model = randomize(oftfx.transform(base, {"*.experts.*_proj": OFT(16)}), std=0.05)
    result = oftfx.fold(model, quantized="requantize")
    assert [(s.format, s.action) for s in result.report] == [("mxfp4", "requantized"), ("dense", "folded")]


def test_codes_are_found_again():
    torch.manual_seed(0)
    scale = 2.0 ** torch.randint(-20, 4, (40, 3))
    codes = torch.randint(0, 16, (40, 3, 32), dtype=torch.uint8)
    codes[0] = 0
    weight = (Float4().decode(codes) * scale.unsqueeze(-1)).flatten(1)
    found = codes_of(weight)
    assert torch.equal(
        Float4().decode(found.codes).view(40, 3, 32) * found.scale.view(40, 3, 1), weight.view(40, 3, 32)
    )
    assert codes_of(weight * 1.1) is None
    assert codes_of(weight[:, :40]) is None


@pytest.mark.parametrize(
    "rules", [{"*.experts.*_proj": OFT(16)}, {"*.experts.down_proj": OFT(16)}], ids=["both", "one"]
)
def test_a_fold_of_files_writes_the_same_bytes(rules, written, tmp_path):
    path, _ = written
    model = randomize(oftfx.transform(read(path, dtype=torch.float32), {**rules, "*.q_proj": OFT(16)}), std=0.05)
    oftfx.save_adapter(model, tmp_path / "adapter", convention="oftfx")
    oftfx.fold(model, quantized="requantize").save(tmp_path / "model")
    report = oftfx.fold_checkpoint(path, tmp_path / "adapter", tmp_path / "files", quantized="requantize")
    assert {s.format for s in report} == {"dense", "mxfp4"}
    from_model, from_files = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "files")
    assert from_model.keys() == from_files.keys()
    turned = {s.fqn for s in report}
    for name, tensor in from_files.items():
        if name.endswith(("_blocks", "_scales")) and name.rpartition("_")[0] not in turned:
            assert torch.equal(tensor, tensors_of(path)[name])  # as it was; of equal values, scales may differ
        else:
            assert torch.equal(tensor, from_model[name]), name
    for policy in (None, "float"):
        with pytest.raises(FoldError, match=r"experts in MXFP4.*quantized='requantize'"):
            oftfx.fold_checkpoint(path, tmp_path / "adapter", tmp_path / "other", quantized=policy)
    assert not (tmp_path / "other").exists()
