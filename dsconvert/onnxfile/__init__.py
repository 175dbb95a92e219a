"""ONNX files from anywhere: loaded within bounds, inspected, tried out, and lowered to our graph."""
