"""From a torch model to a verified ONNX file."""
