"""ONNX graphs of the float and the converted network."""
