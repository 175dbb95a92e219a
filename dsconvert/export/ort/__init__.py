"""What ONNX Runtime is fast at."""
