"""Rotations of what layers give out: LyCORIS's own package, kohya's and ComfyUI's formulas, both ways."""

import pytest
import torch
from safetensors.torch import load_file

import oftfx
from oftfx.errors import AdapterError, AdapterFileError, OftfxWarning
from tests.adapter.conventions.models import (
    CONVOLUTIONS,
    LINEARS,
    apart,
    images,
    matrix,
    net,
    outputs,
    spread,
    with_weights,
)
from tests.adapter.conventions.published import comfyui, kohya, write
from tests.reference import rel

LAYERS = (*LINEARS, *CONVOLUTIONS)


def lycoris_net(algo, size, **config):
    """A net with LyCORIS's own modules, their numbers far from the identity."""
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_module": [], "target_name": [".*"]})
    model = net()
    options = {"linear_dim": size, "conv_dim": 4, "linear_alpha": 1, "conv_alpha": 1}
    network = create_lycoris(model, 1.0, algo=algo, **options, **config)
    network.apply_to()
    for index, (name, parameter) in enumerate(network.named_parameters()):
        numbers = spread(parameter.shape, index, 0.3).float()
        parameter.data = numbers if "oft_blocks" in name else 1 + numbers
    return model, network.eval()


@pytest.mark.needs("lycoris")
@pytest.mark.parametrize("config", [{}, {"constraint": 0.01}, {"rescaled": True}], ids=str)
@pytest.mark.parametrize(("algo", "size"), [("diag-oft", 4), ("boft", 6)])
def test_lycoris_file_gives_lycoris_outputs(tmp_path, algo, size, config):
    theirs, network = lycoris_net(algo, size, **config)
    file = tmp_path / "adapter.safetensors"
    network.save_weights(file, torch.float32, {})
    assert oftfx.adapter_convention(file) == "lycoris"
    expected = outputs(theirs)
    if config.get("rescaled"):
        with pytest.warns(OftfxWarning, match="6 layers.*scales of rows"):
            ours = oftfx.load_adapter(net(), file)
    else:
        ours = oftfx.load_adapter(net(), file)
    assert apart(ours) > 0.01
    assert rel(outputs(ours), expected) <= 1e-6
    assert rel(outputs(oftfx.fold(ours).model), expected) <= 1e-6


@pytest.mark.needs("lycoris")
def test_half_precision_and_convolutions_of_one_and_three_dimensions(tmp_path):
    from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights

    def base():
        layers = torch.nn.Conv1d(6, 8, 3, groups=2), torch.nn.Unflatten(2, (2, 2, 2)), torch.nn.Conv3d(8, 12, 2)
        for index, parameter in enumerate(p for layer in layers for p in layer.parameters()):
            parameter.data = spread(parameter.shape, index, 0.3).float()
        return torch.nn.Sequential(*layers).eval()

    LycorisNetwork.apply_preset({"target_module": [], "target_name": [".*"]})
    network = create_lycoris(base(), 1.0, algo="diag-oft", linear_dim=4, conv_dim=4, constraint=0.03, rescaled=True)
    network.apply_to()  # which is when it has its modules
    for index, parameter in enumerate(network.parameters()):
        parameter.data += spread(parameter.shape, index, 0.3).float()
    network.save_weights(tmp_path / "a.safetensors", torch.float16, {})
    theirs, x = base(), spread((2, 6, 10), 1).float()
    create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), theirs)[0].eval().apply_to()
    with pytest.warns(OftfxWarning, match="training from here on goes without it|2 layers"):
        ours = oftfx.load_adapter(base(), tmp_path / "a.safetensors", trainable=True).eval()
    with torch.no_grad():
        assert rel(ours(x), theirs(x)) <= 1e-6
        assert rel(ours(x), base()(x)) > 0.05


def test_a_bound_is_not_kept_in_training_and_says_so(tmp_path):
    file = write(
        tmp_path / "a.safetensors", {"lora_unet_proj.oft_blocks": blocks_for("proj"), "lora_unet_proj.alpha": 0.1}
    )
    with pytest.warns(OftfxWarning, match=r"its bound on norms \(alpha\) .*; training from here on goes without it"):
        oftfx.load_adapter(net(), file, trainable=True)
    oftfx.load_adapter(net(), file)


@pytest.mark.needs("lycoris")
@pytest.mark.parametrize("rescaled", [False, True])
def test_lycoris_loads_what_is_written(tmp_path, rescaled):
    from lycoris import create_lycoris_from_weights

    _, network = lycoris_net("diag-oft", 4, constraint=0.02, rescaled=rescaled)
    network.save_weights(tmp_path / "theirs.safetensors", torch.float32, {})
    with pytest.warns(OftfxWarning) if rescaled else pytest.MonkeyPatch.context():
        ours = oftfx.load_adapter(net(), tmp_path / "theirs.safetensors")
    file = oftfx.save_adapter(ours, tmp_path / "ours.safetensors", convention="lycoris")
    assert {k.rpartition(".")[2] for k in load_file(file)} == {"oft_blocks", "alpha"} | (
        {"rescale"} if rescaled else set()
    )
    again = net()
    wrapper, _ = create_lycoris_from_weights(1.0, str(file), again)
    wrapper.apply_to()
    wrapper.eval()
    assert rel(outputs(again), outputs(ours)) <= 1e-6


def blocks_for(name, count=4):
    out = net().get_submodule(name).weight.shape[0]
    return spread((count, out // count, out // count), len(name), 0.4).float()


def of_formula(formula, alpha):
    return outputs(with_weights({n: formula(matrix(n), blocks_for(n), alpha) for n in LAYERS}))


@pytest.mark.parametrize("alpha", [1e-2, 10.0])
def test_kohya_by_its_formula_both_ways(tmp_path, alpha):
    tensors = {}
    for name in LAYERS:
        key = "oft_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.oft_blocks": blocks_for(name), f"{key}.alpha": torch.tensor(alpha)}
    file = write(tmp_path / "a.safetensors", tensors, ss_network_module="networks.oft")
    assert oftfx.adapter_convention(file) == "kohya"
    ours = oftfx.load_adapter(net(), file)
    expected = of_formula(kohya, alpha)
    assert rel(outputs(ours), expected) <= 1e-6
    assert apart(ours) > (0.3 if alpha > 1 else 0.02)
    written = load_file(oftfx.save_adapter(ours, tmp_path / "b.safetensors", convention="kohya"))
    weights = {
        n: kohya(matrix(n), written[f"{k}.oft_blocks"], float(written[f"{k}.alpha"]))
        for n, k in ((n, "oft_unet_" + n.replace(".", "_")) for n in LAYERS)
    }
    assert rel(outputs(with_weights(weights)), outputs(ours)) <= 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.5, 100.0])
def test_comfyui_by_its_formula_both_ways(tmp_path, alpha):
    tensors = {f"diffusion_model.{n}.oft_blocks": blocks_for(n) for n in LAYERS}
    tensors |= {f"diffusion_model.{n}.alpha": alpha for n in LAYERS}
    file = write(tmp_path / "a.safetensors", tensors)
    assert oftfx.adapter_convention(file) == "comfyui"
    ours = oftfx.load_adapter(net(), file)
    assert rel(outputs(ours), of_formula(comfyui, alpha)) <= 1e-6
    written = load_file(oftfx.save_adapter(ours, tmp_path / "b.safetensors", convention="comfyui"))
    weights = {n: comfyui(matrix(n), written[f"diffusion_model.{n}.oft_blocks"], 0.0) for n in LAYERS}
    assert rel(outputs(with_weights(weights)), outputs(ours)) <= 1e-6


def test_equal_tensors_mean_other_rotations_and_only_names_tell(tmp_path):
    """The same blocks and alpha: LyCORIS bounds by alpha * out, ComfyUI by alpha."""
    numbers = {"oft_blocks": blocks_for("blocks.0.to_q"), "alpha": torch.tensor(0.1)}
    found = {}
    for convention, key in {
        "lycoris": "lora_unet_blocks_0_to_q",
        "kohya": "oft_unet_blocks_0_to_q",
        "comfyui": "diffusion_model.blocks.0.to_q",
    }.items():
        file = write(tmp_path / f"{convention}.safetensors", {f"{key}.{k}": v for k, v in numbers.items()})
        assert oftfx.adapter_convention(file) == convention
        found[convention] = outputs(oftfx.load_adapter(net(), file))
    assert torch.allclose(found["lycoris"], found["kohya"], atol=1e-5)
    assert rel(found["comfyui"], found["lycoris"]) > 0.01
    unknown = write(tmp_path / "x.safetensors", {f"mine_blocks_0_to_q.{k}": v for k, v in numbers.items()})
    with pytest.raises(AdapterFileError, match=r"fit several.*'lycoris' .*'kohya' .*'comfyui'.*convention=\.\.\."):
        oftfx.load_adapter(net(), unknown)
    chosen = oftfx.load_adapter(net(), unknown, convention="comfyui", part="mine_")
    assert torch.equal(outputs(chosen), found["comfyui"])
    noted = write(
        tmp_path / "n.safetensors",
        {f"lora_unet_blocks_0_to_q.{k}": v for k, v in numbers.items()},
        ss_network_module="networks.oft",
    )
    with pytest.raises(AdapterFileError, match="fit several.*'lycoris' .*'kohya'"):
        oftfx.adapter_convention(noted)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"lora_unet_proj.dora_scale": torch.ones(8, 1)},
            AdapterFileError,
            "dora_scale is nothing that convention 'lycoris'",
        ),
        ({"lora_unet_proj.lora_up.weight": torch.ones(8, 1)}, AdapterFileError, "lora_up.weight is nothing"),
        ({"lora_unet_proj.rescale": torch.ones(7, 1, 1, 1)}, AdapterFileError, "no scale of the rows of proj"),
        ({"lora_unet_proj.rescale": torch.ones(8, 2, 1, 1)}, AdapterFileError, "no scale of the rows of proj"),
        ({"lora_unet_proj.alpha": torch.ones(3)}, AdapterFileError, "expected one number"),
        ({"lora_unet_conv_in.alpha": torch.ones(())}, AdapterFileError, "of no layer with oft_blocks"),
        ({"lora_unet_proj.oft_blocks": torch.ones(4, 3, 3)}, AdapterFileError, r"k \* b = 8"),
        ({"lora_unet_proj.oft_blocks": torch.ones(2, 4, 2)}, AdapterFileError, r"k \* b = 8"),
        ({"lora_unet_proj.oft_blocks": torch.ones(4, 2, 3, 3)}, AdapterFileError, r"k \* b = 8.*factor"),
        ({"lora_unet_proj.oft_blocks": torch.ones(3, 8, 1, 1)}, AdapterFileError, "even size"),
        ({"lora_unet_proj.oft_blocks": torch.ones(4, 4, 2, 2)}, AdapterFileError, "turn groups of 16"),
        ({"lora_unet_proj.oft_blocks": torch.ones(4, 2, 2).long()}, AdapterFileError, "dtype I64, expected a float"),
        ({"lora_unet_proj.oft_blocks": torch.full((4, 2, 2), torch.nan)}, AdapterFileError, "not finite"),
        (
            {"lora_unet_nothing.oft_blocks": torch.ones(4, 2, 2)},
            AdapterError,
            "lora_unet_nothing, which is no layer of Net",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_no_rotation_here_is_refused_by_name(tmp_path, changes, kind, message):
    tensors = {"lora_unet_proj.oft_blocks": blocks_for("proj"), "lora_unet_proj.alpha": torch.tensor(0.0), **changes}
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(kind, match=message):
        oftfx.load_adapter(model, write(tmp_path / "a.safetensors", tensors))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_refusals_of_one_writer(tmp_path):
    kohyas = {f"oft_unet_{n}.oft_blocks": blocks_for(n) for n in CONVOLUTIONS}
    with pytest.raises(AdapterFileError, match="oft_unet_conv_in has no alpha"):
        oftfx.load_adapter(net(), write(tmp_path / "a.safetensors", kohyas))
    differing = kohyas | {"oft_unet_proj.alpha": 0.1, "oft_unet_conv_in.alpha": 0.2}
    with pytest.raises(AdapterFileError, match=r"alphas differ \(0.1 to 0.2\)"):
        oftfx.load_adapter(net(), write(tmp_path / "b.safetensors", differing))
    fused = {"oft_unet_proj.oft_blocks.0": torch.ones(2, 2, 2), "oft_unet_proj.alpha": 0.1}
    with pytest.raises(AdapterFileError, match="networks.oft_flux"):
        oftfx.load_adapter(net(), write(tmp_path / "c.safetensors", fused))
    comfy = {
        "diffusion_model.proj.oft_blocks": blocks_for("proj"),
        "diffusion_model.proj.rescale": torch.full((8, 1), 2.0),
    }
    with pytest.raises(AdapterFileError, match="leaves it out when it applies"):
        oftfx.load_adapter(net(), write(tmp_path / "d.safetensors", comfy))


def output_side(tmp_path, model=None, names=LAYERS, **options):
    tensors = {f"lycoris_{n.replace('.', '_')}.oft_blocks": blocks_for(n) for n in names}
    return oftfx.load_adapter(model or net(), write(tmp_path / "o.safetensors", tensors), **options)


def test_an_adapter_of_outputs_lives_like_any_other(tmp_path):
    model = output_side(tmp_path, trainable=True)
    assert oftfx.adapter_parameters(model)[0].shape == (4, 1)
    loss = model(images()).square().mean()
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in oftfx.adapter_parameters(model))
    with torch.no_grad():
        for parameter in oftfx.adapter_parameters(model):
            parameter.sub_(0.1 * parameter.grad)
    model.eval()
    here = outputs(model)
    oftfx.save_adapter(model, tmp_path / "own", convention="oftfx")
    assert torch.equal(outputs(oftfx.load_adapter(net(), tmp_path / "own")), here)
    assert rel(outputs(oftfx.unfold(oftfx.fold(model))), here) == 0
    with oftfx.disable_adapters(model):
        assert torch.equal(outputs(model), outputs(net()))
    again = oftfx.transform(net(), oftfx.adapters(model)["default"])
    assert torch.equal(outputs(again), outputs(net()))
    oftfx.load_adapter(again, tmp_path / "own")
    assert torch.equal(outputs(again), here)


def test_two_sides_of_one_layer_do_not_mix(tmp_path):
    model = oftfx.transform(net(), {"conv_in": oftfx.OFT(4)})
    with pytest.raises(
        AdapterError, match="conv_in: one adapter rotates what this layer reads and another what it gives"
    ):
        output_side(tmp_path, model, names=("conv_in",), adapter="other")
    model = output_side(tmp_path, names=("conv_in",))
    with pytest.raises(
        AdapterError, match="conv_in: one adapter rotates what this layer reads and another what it gives"
    ):
        oftfx.add_adapter(model, "other", {"conv_in": oftfx.OFT(4)})


@pytest.mark.parametrize("convention", ["peft", "peft-0.14", "oft_v2", "diffusers"])
def test_conventions_of_inputs_cannot_say_rotated_outputs(tmp_path, convention):
    model = output_side(tmp_path)
    path = tmp_path / ("w.safetensors" if convention in ("oft_v2", "diffusers") else "w")
    with pytest.raises(AdapterError, match="another function of the weight"):
        oftfx.save_adapter(model, path, convention=convention)
    assert not path.exists()


@pytest.mark.parametrize("convention", ["lycoris", "kohya", "comfyui"])
def test_conventions_of_outputs_cannot_say_rotated_inputs(tmp_path, convention):
    model = oftfx.transform(net(), {"*": oftfx.OFT(4)})
    with pytest.raises(AdapterError, match="rotates the layer's inputs, and convention"):
        oftfx.save_adapter(model, tmp_path / "w.safetensors", convention=convention)


def test_shapes_that_a_writer_would_not_load_are_not_written(tmp_path):
    few = {"lycoris_proj.oft_blocks": blocks_for("proj", 2), "lycoris_conv_in.oft_blocks": blocks_for("conv_in", 4)}
    model = oftfx.load_adapter(net(), write(tmp_path / "a.safetensors", few))
    with pytest.raises(AdapterError, match="2 blocks of 4; LyCORIS takes the smaller number"):
        oftfx.save_adapter(model, tmp_path / "b.safetensors", convention="lycoris")
    with pytest.raises(AdapterError, match="one number for all"):
        oftfx.save_adapter(model, tmp_path / "b.safetensors", convention="kohya")
    oftfx.save_adapter(model, tmp_path / "b.safetensors", convention="comfyui")
    named = oftfx.save_adapter(model, tmp_path / "c.safetensors", convention="comfyui", part="lora_te_")
    assert sorted(load_file(named))[0] == "lora_te_conv_in.alpha"
    with pytest.raises(AdapterError, match="part='x': files of convention 'oftfx' are of one model"):
        oftfx.save_adapter(model, tmp_path / "d", convention="oftfx", part="x")
    again = oftfx.load_adapter(net(), tmp_path / "b.safetensors")
    assert rel(outputs(again), outputs(model)) <= 1e-6
