"""PEFT's BOFT and HRA, by PEFT itself; sd-scripts' BOFT, by its formula. They fold."""

import pytest
import torch

import oftfx
from oftfx.adapter.from_file import AdapterFiles
from oftfx.errors import AdapterError, AdapterFileError, OftfxWarning
from tests.adapter.conventions.models import CONVOLUTIONS, LINEARS, apart, matrix, net, outputs, spread, with_weights
from tests.adapter.conventions.published import sd_scripts_boft, write
from tests.reference import rel

ALL = ["to_q", "to_out.0", "proj", "conv_in"]


class InTorch:
    """PEFT's CUDA kernel for block diagonal matrices: BOFT with more than one factor needs it."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor.unbind()) for factor in blocks])]


@pytest.fixture
def peft(monkeypatch):
    package = pytest.importorskip("peft")
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: InTorch)
    return package


def adapted(package, config):
    model = package.get_peft_model(net(), config)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            numbers = spread(parameter.shape, index, 0.5).float()
            parameter.data = 1 + 0.2 * numbers if "boft_s" in name else parameter.data + numbers
    return model.eval()


BOFTS = [
    {"boft_block_size": 4, "target_modules": ALL},
    {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "target_modules": ALL},
    {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": ["proj", "blocks.0.to_q"]},
    {"boft_block_size": 2, "boft_n_butterfly_factor": 3, "target_modules": ["proj", "to_q"]},
    {"boft_block_size": 0, "boft_block_num": 2, "bias": "boft_only", "target_modules": ["to_q"]},
]


@pytest.mark.needs("peft")
@pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning", "ignore::UserWarning:peft")
@pytest.mark.parametrize("config", BOFTS, ids=str)
def test_boft_gives_pefts_outputs_and_folds(peft, tmp_path, config):
    theirs = adapted(peft, peft.BOFTConfig(**config))
    expected = outputs(theirs)
    theirs.save_pretrained(tmp_path)
    assert oftfx.adapter_convention(tmp_path) == "peft-boft"
    ours = oftfx.load_adapter(net(), tmp_path)
    assert apart(ours) > 0.05
    assert rel(outputs(ours), expected) <= 1e-6
    assert rel(outputs(oftfx.fold(ours).model), expected) <= 1e-6
    assert oftfx.adapters(ours)["default"].train_bias == ("oft" if "bias" in config else "none")
    with pytest.raises(AdapterError, match=r"this is a PeftModel: give the base model, which peft_model\.unload\(\)"):
        oftfx.load_adapter(theirs, tmp_path)
    with pytest.raises(AdapterFileError, match=r"oftfx\.load_adapter reads other conventions"):
        AdapterFiles.read(tmp_path)  # as fold_checkpoint and servers do
    factors = config.get("boft_n_butterfly_factor", 1)
    if size := config["boft_block_size"]:
        assert {e.block_size for e in oftfx.adapters(ours)["default"]} == {size * 2 ** (factors - 1)}


HRAS = [
    {"r": 4, "target_modules": ALL},
    {"r": 4, "apply_GS": True, "target_modules": ["to_q", "to_out.0"]},
    {"r": 3, "target_modules": ["to_q", "to_out.0"]},
    {"r": 1, "apply_GS": True, "target_modules": ["to_q"]},
    {"r": 8, "target_modules": ["proj"]},
]


@pytest.mark.needs("peft")
@pytest.mark.filterwarnings("ignore::oftfx.errors.OftfxWarning", "ignore::UserWarning:peft")
@pytest.mark.parametrize("config", HRAS, ids=str)
def test_hra_gives_pefts_outputs_and_folds(peft, tmp_path, config):
    theirs = adapted(peft, peft.HRAConfig(**config))
    expected = outputs(theirs)
    theirs.save_pretrained(tmp_path)
    assert oftfx.adapter_convention(tmp_path) == "peft-hra"
    ours = oftfx.load_adapter(net(), tmp_path)
    assert apart(ours) > 0.05
    assert rel(outputs(ours), expected) <= 1e-6
    assert rel(outputs(oftfx.fold(ours).model), expected) <= 1e-6
    # A product of an odd number of reflections is no rotation: what is left goes into weights of the adapter's own.
    assert bool(oftfx.adapters(ours)["default"].brought) >= bool(config["r"] % 2)


@pytest.mark.needs("peft", "transformers")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_layers_that_read_the_same_rotate_together(peft, tiny_llama, ids, tmp_path):
    theirs = peft.get_peft_model(tiny_llama(), peft.HRAConfig(r=2, target_modules=["q_proj", "k_proj", "down_proj"]))
    for index, (name, parameter) in enumerate(theirs.named_parameters()):
        if "hra_u" in name:
            parameter.data += spread(parameter.shape, index, 0.2).float()
    theirs.eval().save_pretrained(tmp_path)
    ours = oftfx.load_adapter(tiny_llama(), tmp_path)
    assert rel(ours(**ids()).logits, theirs(**ids()).logits) <= 1e-6
    assert oftfx.adapters(ours)["default"]["model.layers.0.self_attn.k_proj"].same_input
    assert rel(oftfx.fold(ours).model(**ids()).logits, theirs(**ids()).logits) <= 1e-5


@pytest.mark.needs("peft")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_rotation_that_was_hra_is_written_as_pefts_oft(peft, tmp_path):
    theirs = adapted(peft, peft.HRAConfig(r=2, target_modules=["proj"]))
    theirs.save_pretrained(tmp_path / "hra")
    ours = oftfx.load_adapter(net(), tmp_path / "hra", trainable=True).eval()
    oftfx.save_adapter(ours, tmp_path / "oft")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "oft").eval()
    assert rel(outputs(again), outputs(theirs)) <= 1e-6
    scaled = adapted(peft, peft.BOFTConfig(boft_block_size=4, target_modules=["blocks.0.to_q", "proj"]))
    scaled.save_pretrained(tmp_path / "boft")
    with pytest.warns(OftfxWarning, match="2 layers"):
        mine = oftfx.load_adapter(net(), tmp_path / "boft")
    oftfx.save_adapter(mine, tmp_path / "oft")  # with weights of its own, which PEFT loads as well
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "oft").eval()
    assert rel(outputs(again), outputs(scaled)) <= 1e-6
    with pytest.raises(AdapterError, match="convention: got 'peft-hra', a rotation needs as many reflections"):
        oftfx.save_adapter(ours, tmp_path / "x", convention="peft-hra")


@pytest.mark.needs("bitsandbytes", "peft")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_pure_rotation_goes_in_front_of_a_quantized_layer_and_a_scale_does_not(peft, tmp_path):
    from oftfx.formats import format_named

    def base():
        torch.manual_seed(0)
        return torch.nn.Sequential(format_named("bnb8").make_tiny(64, 12))

    torch.manual_seed(1)
    x, factors = torch.randn(3, 64), torch.randn(2, 16, 4, 4) * 0.2
    keys = {"base_model.model.0.boft_R": factors, "base_model.model.0.boft_s": torch.ones(12, 1)}
    write(tmp_path / "adapter_model.safetensors", keys)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "BOFT", "target_modules": ["0"]}')
    model = oftfx.load_adapter(base(), tmp_path)
    product = sd_scripts_boft(torch.eye(64).double(), factors, torch.ones(64)).T  # x @ R of the eye is R^T
    assert rel(model(x), base()(x @ product.float())) <= 0.02  # its own quantization of activations
    assert rel(oftfx.fold(model, quantized="keep").model(x), model(x)) <= 1e-5
    write(tmp_path / "adapter_model.safetensors", keys | {"base_model.model.0.boft_s": torch.full((12, 1), 1.5)})
    with pytest.raises(AdapterError, match="plain floats, and this Linear8bitLt stores bnb8"):
        oftfx.load_adapter(base(), tmp_path)


@pytest.mark.parametrize(("size", "count"), [(4, 1), (2, 2), (4, 2), (2, 3)])
def test_sd_scripts_boft_by_its_formula(tmp_path, size, count):
    names = (*LINEARS[:1], *CONVOLUTIONS[1:])
    tensors, weights = {}, {}
    for index, name in enumerate(names):
        w = matrix(name)
        factors = spread((count, w.shape[1] // size, size, size), index, 0.6).float()
        scale = 1 + spread((len(w), 1), index, 0.1).float()
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.boft_R": factors, f"{key}.boft_s": scale}
        weights[name] = sd_scripts_boft(w, factors, scale.double())
    file = write(tmp_path / "a.safetensors", tensors)
    assert oftfx.adapter_convention(file) == "sd-scripts-boft"
    with pytest.warns(OftfxWarning, match="2 layers"):
        ours = oftfx.load_adapter(net(), file)
    assert rel(outputs(ours), outputs(with_weights(weights))) <= 1e-6
    with pytest.raises(AdapterError, match="got 'sd-scripts-boft', a rotation of full blocks is no product"):
        oftfx.save_adapter(ours, tmp_path / "b.safetensors", convention="sd-scripts-boft")


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("HRA", {"hra_u": torch.ones(7, 2)}, r"needs \(8, r\)"),
        ("HRA", {"hra_u": torch.ones(8)}, r"needs \(8, r\)"),
        ("HRA", {"hra_u": torch.zeros(8, 2)}, "a column of zeros"),
        ("BOFT", {"boft_R": torch.ones(1, 3, 4, 4)}, r"k \* b = 8"),
        ("BOFT", {"boft_R": torch.ones(4, 4, 2, 2)}, "turn groups of 16"),
        ("BOFT", {"boft_s": torch.ones(8, 1)}, "proj has no boft_R"),
        ("BOFT", {"boft_R": torch.ones(1, 2, 4, 4), "boft_s": torch.ones(9, 1)}, r"expected \(8, 1\)"),
        ("OFT", {"boft_R": torch.ones(1, 2, 4, 4)}, "peft_type is 'OFT', the keys of the weights are of BOFT"),
    ],
    ids=str,
)
def test_damage_is_refused(tmp_path, kind, tensors, message):
    found = {f"base_model.model.proj.{k}": v for k, v in tensors.items()}
    if "boft_s" in tensors and "boft_R" not in tensors:
        found["base_model.model.blocks.0.to_q.boft_R"] = torch.ones(1, 2, 4, 4)
    write(tmp_path / "adapter_model.safetensors", found)
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{kind}", "target_modules": ["proj"]}}')
    with pytest.raises(AdapterFileError, match=message):
        oftfx.load_adapter(net(), tmp_path)
