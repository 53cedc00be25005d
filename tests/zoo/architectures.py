"""Tiny random models of every family, each small enough to be compared with dense algebra.

An `Architecture` builds a model in eval mode with no dropout and makes inputs for it. Every weight is drawn anew at a
scale where it matters: several of these models start with layers at zero (adaLN of DiT and Flux, the layer scale of
ConvNeXt) or with a standard deviation of 0.02, and a check on a layer that has no influence checks nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from tests.zoo import plain

VOCABULARY, HIDDEN, LAYERS, HEADS, WIDE = 96, 32, 2, 4, 48


@dataclass(frozen=True)
class Architecture:
    """One tiny model.

    Attributes:
        name: of the architecture.
        family: what it stands for in a table.
        make: the model, its weights still as its own code draws them.
        inputs: ``(batch, length, generator) -> keyword arguments``.
        packages: what it needs to be installed.
        fixed: sizes that the model does not let vary: ``"batch"``, ``"length"``.
        rung: the highest rung its program can be recorded on.
        skips: globs of the weight matrices that have no input axis to rotate, and that a plan therefore skips.
        wide: whether all of it computes in float64 when asked to, so that gradients can be compared that closely.
        notes: what is special about it.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, torch.Generator], dict[str, Any]]
    packages: tuple[str, ...] = ("transformers",)
    fixed: tuple[str, ...] = ()
    rung: str = "graph"
    skips: tuple[str, ...] = ()
    wide: bool = True
    notes: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        """The model in eval mode; the same for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make()
        return enliven(model, seed).eval()

    def example(self, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for a call; sizes that are fixed stay as they are."""
        batch = 2 if "batch" in self.fixed else batch
        length = 12 if "length" in self.fixed else length
        return self.inputs(batch, length, torch.Generator().manual_seed(seed))

    def other(self) -> dict[str, Any]:
        """Inputs of another batch, length and seed."""
        return self.example(3, 9, seed=1)


def enliven(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter so that each layer's output has the size of its input and depends on each weight."""
    generator = torch.Generator().manual_seed(seed)
    done = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                if parameter.dim() < 2 or name == "A_log":  # norms, biases, scales, decay rates: near what they are
                    parameter.add_(0.1 * noise)
                else:
                    parameter.copy_(noise * _scale(module, parameter))
    return model


def _scale(module: nn.Module, weight: torch.Tensor) -> float:
    if isinstance(module, nn.Embedding) or weight.shape[0] == 1:  # tables, class tokens
        return 0.5
    if type(module).__name__ == "Conv1D":
        inputs = weight.shape[0]
    elif weight.dim() == 3 and not isinstance(module, nn.Conv1d):  # one matrix an expert
        inputs = weight.shape[1 if getattr(module, "is_transposed", False) else 2]
    else:
        inputs = weight[0].numel()
    return inputs**-0.5


def _hugging_face(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        cls = getattr(importlib.import_module("transformers"), name)
        return cls(cls.config_class(**config))

    return make


def _diffusers(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return getattr(importlib.import_module("diffusers"), name)(**config)

    return make


def _tokens(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _unpadded(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(batch, length, generator)["input_ids"]}


def _pairs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    decoder = torch.randint(5, VOCABULARY, (batch, length - 3), generator=generator)
    return {**_tokens(batch, length, generator), "decoder_input_ids": decoder}


def _speech(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    return {"input_features": torch.randn(batch, 8, 32, generator=generator), "decoder_input_ids": ids}


def _sound(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 16 * length, generator=generator)}


def _image(batch: int, side: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}


def _square(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return _image(batch, 32, generator)


def _any_square(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return _image(batch, length // 3 * 8, generator)


def _text_and_image(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**_tokens(batch, length, generator), **_square(batch, length, generator)}


def _text_with_image(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    inputs = _text_and_image(batch, length, generator)
    inputs["input_ids"][:, 1:5] = 4  # four patches
    return inputs


def _latents(batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(batch, length, 16, generator=generator),
    }


def _classes(batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.full((batch,), 5),
        "class_labels": torch.arange(batch),
    }


def _packed_latents(batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, length, 16, generator=generator),
        "pooled_projections": torch.randn(batch, 16, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(length, 3),
    }


def _pixels(batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    side = length // 3 * 4
    return {"sample": torch.randn(batch, 3, side, side, generator=generator), "sample_posterior": False}


def _vectors(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(batch, length, HIDDEN, generator=generator)}


def _pictures(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(batch, 3, length, length, generator=generator)}


def _volumes(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(batch, 8, 4, length, generator=generator)}


def _ids(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(VOCABULARY, (batch, length), generator=generator)}


_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
}
_NAMED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_CAUSAL = {**_SIZE, **_NAMED, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_STILL = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_TWO_SIDED = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": WIDE,
    "decoder_ffn_dim": WIDE,
    "decoder_start_token_id": 1,
    "use_cache": False,
    **_NAMED,
    **_STILL,
}
_EYES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "image_size": 32,
}

_TEXT = (
    Architecture("bert", "text encoder", _hugging_face("BertForMaskedLM", **_SIZE, **_QUIET), _tokens),
    Architecture("roberta", "text encoder", _hugging_face("RobertaForMaskedLM", **_SIZE, **_QUIET), _tokens),
    Architecture(
        "distilbert",
        "text encoder",
        _hugging_face(
            "DistilBertForSequenceClassification",
            vocab_size=VOCABULARY,
            dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=WIDE,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        ),
        _tokens,
    ),
    Architecture(
        "deberta_v2",
        "text encoder",
        _hugging_face(
            "DebertaV2ForSequenceClassification",
            **_SIZE,
            **_QUIET,
            relative_attention=True,
            position_buckets=16,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pooler_dropout=0.0,
            cls_dropout=0.0,
            pooler_hidden_size=HIDDEN,
        ),
        _tokens,
        skips=("*.rel_embeddings",),
        notes="projections of the relative positions are called twice in each layer",
    ),
    Architecture(
        "modernbert",
        "text encoder",
        _hugging_face(
            "ModernBertForMaskedLM",
            **_SIZE,
            **_NAMED,
            max_position_embeddings=64,
            local_attention=8,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        _tokens,
    ),
)

_DECODERS = (
    Architecture(
        "gpt2",
        "causal",
        _hugging_face(
            "GPT2LMHeadModel",
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            **_NAMED,
        ),
        _tokens,
        notes="layers of class Conv1D, whose weight is (in, out)",
    ),
    Architecture(
        "gpt_neox", "causal", _hugging_face("GPTNeoXForCausalLM", **_SIZE, **_NAMED, use_cache=False), _tokens
    ),
    Architecture(
        "gptj",
        "causal",
        _hugging_face(
            "GPTJForCausalLM",
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=64,
            rotary_dim=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            **_NAMED,
        ),
        _tokens,
    ),
    Architecture(
        "opt",
        "causal",
        _hugging_face(
            "OPTForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_dim=WIDE,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
            **_NAMED,
        ),
        _tokens,
        notes="projects its embeddings in and out",
    ),
    Architecture(
        "bloom",
        "causal",
        _hugging_face(
            "BloomForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
            **_NAMED,
        ),
        _tokens,
    ),
    Architecture(
        "falcon",
        "causal",
        _hugging_face(
            "FalconForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_hidden_size=WIDE,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cache=False,
            **_NAMED,
        ),
        _tokens,
        notes="FalconLinear computes its product itself, without F.linear",
    ),
    Architecture("llama", "causal", _hugging_face("LlamaForCausalLM", **_CAUSAL), _tokens),
    Architecture(
        "mistral", "causal", _hugging_face("MistralForCausalLM", **_CAUSAL, sliding_window=8, head_dim=8), _tokens
    ),
    Architecture("qwen2", "causal", _hugging_face("Qwen2ForCausalLM", **_CAUSAL, tie_word_embeddings=True), _tokens),
    Architecture("qwen3", "causal", _hugging_face("Qwen3ForCausalLM", **_CAUSAL, head_dim=8), _tokens),
    Architecture(
        "gemma2",
        "causal",
        _hugging_face("Gemma2ForCausalLM", **_CAUSAL, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
        _tokens,
        notes="tied head, scaled embeddings",
    ),
    Architecture(
        "gemma3",
        "causal",
        _hugging_face("Gemma3ForCausalLM", **_CAUSAL, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
        _tokens,
        notes="tied head; its embedding class scales its output",
    ),
    Architecture(
        "phi3",
        "causal",
        _hugging_face("Phi3ForCausalLM", **_CAUSAL, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
        _tokens,
        notes="q, k and v in one layer, gate and up in another",
    ),
)

_EXPERTS = (
    Architecture(
        "mixtral",
        "experts",
        _hugging_face("MixtralForCausalLM", **_CAUSAL, num_local_experts=4, num_experts_per_tok=2),
        _tokens,
        wide=False,
        notes="3-D expert tensors, a router with a raw weight",
    ),
    Architecture(
        "qwen3_moe",
        "experts",
        _hugging_face(
            "Qwen3MoeForCausalLM", **_CAUSAL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        ),
        _tokens,
        wide=False,
    ),
    Architecture(
        "gpt_oss",
        "experts",
        _hugging_face(
            "GptOssForCausalLM", **_CAUSAL, head_dim=8, sliding_window=8, num_local_experts=4, num_experts_per_tok=2
        ),
        _tokens,
        skips=("*_proj_bias",),
        wide=False,
        notes="expert tensors are (experts, in, out) and have biases; attention sinks",
    ),
    Architecture(
        "deepseek_v3",
        "experts",
        _hugging_face(
            "DeepseekV3ForCausalLM",
            **{**_CAUSAL, "num_key_value_heads": HEADS},
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        _tokens,
        skips=("*.mlp.gate",),
        wide=False,
        notes="latent attention; one dense layer, then experts in groups with a shared one",
    ),
)

_SEQ2SEQ = (
    Architecture(
        "t5",
        "seq2seq",
        _hugging_face(
            "T5ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=WIDE,
            num_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            use_cache=False,
        ),
        _pairs,
        notes="one table for encoder, decoder and head",
    ),
    Architecture(
        "bart",
        "seq2seq",
        _hugging_face("BartForConditionalGeneration", **_TWO_SIDED, max_position_embeddings=64, forced_eos_token_id=2),
        _pairs,
    ),
)

_AUDIO = (
    Architecture(
        "whisper",
        "audio",
        _hugging_face(
            "WhisperForConditionalGeneration",
            **_TWO_SIDED,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        _speech,
        notes="the length of the sound is fixed, that of the text is not",
    ),
    Architecture(
        "wav2vec2",
        "audio",
        _hugging_face(
            "Wav2Vec2ForCTC",
            **_SIZE,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            final_dropout=0.0,
            layerdrop=0.0,
            conv_dim=(8, 16),
            conv_stride=(2, 2),
            conv_kernel=(4, 2),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=2,
            mask_time_prob=0.0,
            pad_token_id=0,
        ),
        _sound,
        skips=("*.pos_conv_embed.conv.*",),
        notes="a grouped convolution under weight_norm",
    ),
)

_VISION = (
    Architecture(
        "vit",
        "vision",
        _hugging_face("ViTForImageClassification", **_EYES, **_QUIET, patch_size=8),
        _square,
        skips=("*.cls_token", "*.position_embeddings"),
        fixed=("length",),
    ),
    Architecture(
        "swin",
        "vision",
        _hugging_face(
            "SwinForImageClassification",
            **_QUIET,
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            drop_path_rate=0.0,
        ),
        _square,
        skips=("*.relative_position_bias_table",),
        fixed=("length",),
    ),
    Architecture(
        "convnext",
        "vision",
        _hugging_face(
            "ConvNextForImageClassification", hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, image_size=32
        ),
        _any_square,
        notes="depthwise convolutions; layer scale starts at 1e-6",
    ),
    Architecture(
        "resnet",
        "vision",
        _hugging_face(
            "ResNetForImageClassification",
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[2, 2],
            layer_type="bottleneck",
        ),
        _any_square,
    ),
    Architecture(
        "segformer",
        "vision",
        _hugging_face(
            "SegformerForSemanticSegmentation",
            **_QUIET,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=32,
            classifier_dropout_prob=0.0,
            drop_path_rate=0.0,
            num_labels=3,
        ),
        _any_square,
    ),
)

_MULTIMODAL = (
    Architecture(
        "clip",
        "multimodal",
        _hugging_face(
            "CLIPModel",
            text_config={**_SIZE, **_NAMED, "max_position_embeddings": 32, "projection_dim": HIDDEN},
            vision_config={**_EYES, "patch_size": 8, "projection_dim": HIDDEN},
            projection_dim=HIDDEN,
        ),
        _text_and_image,
        notes="the image's size is fixed, the text's length is not",
    ),
    Architecture(
        "llava",
        "multimodal",
        _hugging_face(
            "LlavaForConditionalGeneration",
            vision_config={**_EYES, "model_type": "clip_vision_model", "patch_size": 16, "projection_dim": HIDDEN},
            text_config={**_CAUSAL, "model_type": "llama"},
            image_token_id=4,
            image_seq_length=4,
            vision_feature_layer=-2,
        ),
        _text_with_image,
        rung="analysis",
        notes="reads a number for an error message; the last layer of its vision tower is computed and thrown away",
    ),
)

_DIFFUSION = (
    Architecture(
        "unet2d",
        "diffusion",
        _diffusers(
            "UNet2DConditionModel",
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        _latents,
        packages=("diffusers",),
    ),
    Architecture(
        "dit",
        "diffusion",
        _diffusers(
            "DiTTransformer2DModel",
            num_attention_heads=HEADS,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=LAYERS,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        ),
        _classes,
        packages=("diffusers",),
        fixed=("length",),
        notes="adaLN starts at zero; the first block's time embedding is also used at the end",
    ),
    Architecture(
        "flux",
        "diffusion",
        _diffusers(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=HEADS,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(2, 2, 4),
        ),
        _packed_latents,
        packages=("diffusers",),
        notes="adaLN starts at zero",
    ),
    Architecture(
        "autoencoder_kl",
        "diffusion",
        _diffusers(
            "AutoencoderKL",
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
        ),
        _pixels,
        packages=("diffusers",),
        notes="without sampling, so the half of the encoder's output that is a variance goes nowhere",
    ),
)

_STATE_SPACE = (
    Architecture(
        "mamba",
        "state space",
        _hugging_face(
            "MambaForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            state_size=8,
            time_step_rank=4,
            use_cache=False,
            **_NAMED,
        ),
        _unpadded,
        skips=("*.A_log", "*.conv1d"),
        notes="a loop over the sequence",
    ),
    Architecture(
        "mamba2",
        "state space",
        _hugging_face(
            "Mamba2ForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=2,
            chunk_size=4,
            use_cache=False,
            **_NAMED,
        ),
        _unpadded,
        skips=("*.conv1d",),
    ),
)

_PLAIN = (
    Architecture("encoder", "plain torch", plain.Encoder, _vectors, (), notes="nn.MultiheadAttention"),
    Architecture("handwritten_resnet", "plain torch", plain.ResNet, _pictures, ()),
    Architecture(
        "functional", "plain torch", plain.Functional, _ids, (), notes="raw parameters, tied weights, a layer twice"
    ),
    Architecture("convolutions", "plain torch", plain.Convolutions, _volumes, (), notes="1-D to 3-D, also transposed"),
    Architecture(
        "branching", "plain torch", plain.Branching, _vectors, (), rung="analysis", notes="branches on its data"
    ),
)

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        *_TEXT,
        *_DECODERS,
        *_EXPERTS,
        *_SEQ2SEQ,
        *_AUDIO,
        *_VISION,
        *_MULTIMODAL,
        *_DIFFUSION,
        *_STATE_SPACE,
        *_PLAIN,
    )
}
"""Every architecture by name."""
