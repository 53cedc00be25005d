"""Operators of ONNX Runtime that do at once what a graph spells out in many; what does not match exactly stays."""
