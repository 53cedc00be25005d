"""The main job on a real language model: 4-bit base, train, fold each way, export, run in ONNX Runtime."""
