"""Inputs of other families under their usual names, and which of their axes are free."""

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.onnx.inputs import auto_dynamic_shapes
from tests.reference import randomize

pytestmark = pytest.mark.needs("onnx", "onnxruntime", "onnxscript", "transformers")


def ids(*shape):
    return torch.randint(3, 90, shape)


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (
            {"input_ids": ids(1, 5), "attention_mask": ones(1, 5), "token_type_ids": ids(1, 5)},
            {n: {0: "batch", 1: "sequence"} for n in ("input_ids", "attention_mask", "token_type_ids")},
        ),
        (
            {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 6), "decoder_attention_mask": ones(2, 6)},
            {
                "input_ids": {0: "batch", 1: "sequence"},
                "decoder_input_ids": {0: "batch", 1: "decoder_sequence"},
                "decoder_attention_mask": {0: "batch", 1: "decoder_sequence"},
            },
        ),
        (
            {"input_ids": ids(3, 6), "pixel_values": torch.randn(2, 3, 8, 8), "timestep": ids(1), "labels": ids(3)},
            {
                "input_ids": {0: "batch", 1: "sequence"},
                "pixel_values": {0: "image_batch"},
                "timestep": {},
                "labels": {0: "batch"},
            },
        ),
        (
            {
                "sample": torch.randn(2, 4, 8, 8),
                "timestep": torch.tensor(3),
                "encoder_hidden_states": torch.randn(2, 5, 24),
                "encoder_attention_mask": ones(2, 5),
            },
            {
                "sample": {0: "batch"},
                "timestep": {},
                "encoder_hidden_states": {0: "batch", 1: "encoder_sequence"},
                "encoder_attention_mask": {0: "batch", 1: "encoder_sequence"},
            },
        ),
        ({"x": torch.randn(2, 7)}, {"x": {0: "batch"}}),
        ({"x": ids(4), "y": torch.randn(4)}, {"x": {0: "batch"}, "y": {0: "batch"}}),
        ({"a": ids(2, 7), "b": ids(2, 3)}, {"a": {0: "batch", 1: "sequence"}, "b": {0: "batch", 1: "b_sequence"}}),
    ],
)
def test_axes(inputs, expected):
    assert auto_dynamic_shapes(inputs) == expected


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def clip():
    """More texts than images."""
    from transformers import CLIPConfig, CLIPModel

    text = {**TOWER, "vocab_size": 99, "max_position_embeddings": 20, "eos_token_id": 98}
    config = CLIPConfig(
        text_config={**text, "bos_token_id": 1, "pad_token_id": 0},
        vision_config={**TOWER, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    inputs = {"input_ids": ids(3, 6), "pixel_values": torch.randn(2, 3, 16, 16), "attention_mask": ones(3, 6)}
    return CLIPModel(config), inputs, ("logits_per_image", {"input_ids": (4, 9), "pixel_values": (6, 3, 16, 16)})


def bart():
    """Two sequences of one length in the example, of two in the check."""
    from transformers import BartConfig, BartForConditionalGeneration

    model = BartForConditionalGeneration(BartConfig(**SEQ2SEQ, max_position_embeddings=40))
    inputs = {"input_ids": ids(2, 6), "attention_mask": ones(2, 6), "decoder_input_ids": ids(2, 6)}
    return model, inputs, ("logits", {"input_ids": (3, 9), "decoder_input_ids": (3, 10)})


def whisper():
    """A spectrogram of fixed size and the decoder's tokens."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **SEQ2SEQ, max_source_positions=10, num_mel_bins=8, decoder_start_token_id=1, begin_suppress_tokens=None
    )
    inputs = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": ids(1, 4)}
    sizes = {"input_features": (3, 8, 20), "decoder_input_ids": (3, 7)}
    return WhisperForConditionalGeneration(config), inputs, ("logits", sizes)


def unet():
    """One timestep for all, without any axis; its result has the name of its input."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(7)}
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 24)
    return model, inputs, ("sample_out", {"timestep": (), "encoder_hidden_states": (3, 8, 24)})


@pytest.mark.parametrize("family", [clip, bart, whisper, pytest.param(unet, marks=pytest.mark.needs("diffusers"))])
def test_families(family, tmp_path):
    base, inputs, (output, sizes) = family()
    rules = {"*to_k": OFT(8), "*conv1": OFT(8)} if family is unet else {"*q_proj": OFT(8), "*fc1": OFT(8)}
    model = randomize(oftfx.transform(base.eval(), rules), std=0.2)
    report = oftfx.export_onnx(model, tmp_path / "m.onnx", inputs)
    assert list(report.inputs) == list(inputs)
    assert report.inputs == auto_dynamic_shapes(inputs)
    assert report.outputs[0] == output
    assert {n: report.checks[0].shapes[n] for n in sizes} == sizes
    assert max(c.relative_error for c in report.checks) < 2e-6
    assert all(c.adapter_effect > 1e-3 for c in report.checks)
