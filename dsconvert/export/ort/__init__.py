"""Graph shapes and operators that ONNX Runtime runs fast."""
