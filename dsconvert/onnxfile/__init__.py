"""A stranger's ONNX file: bounded, loaded, tried, looked into."""
