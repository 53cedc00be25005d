"""Quantized layers as ONNX operators that keep their bits."""

from oftfx.onnx.lower.layers import Lowered, lower_quantized

__all__ = ["Lowered", "lower_quantized"]
