"""The steps of `quantize` and `export`, put together for checkpoints and for ONNX files."""
