"""Models that compressed-tensors quantizes and writes, as llm-compressor has it write them."""

import torch.nn as nn

from oftfx.formats.compressed_tensors import make_compressed


def write_compressed(model, path, *, inputs=None, **weights):
    """Compress every Linear of a transformers model but its head, in place, and save it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus

    inputs = None if inputs is None else QuantizationArgs(**inputs)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, make_compressed(layer, inputs=inputs, **weights))
    model.save_pretrained(path)
    writer = ModelCompressor.from_pretrained_model(model)
    writer.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
    writer.update_config(path)
