"""Whether a file computes in ONNX Runtime what the model computes in torch, and where it does not."""
