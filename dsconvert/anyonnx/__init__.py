"""Float ONNX files of any origin: their convolutions and matrix products fitted as DSConv, all else left as it is."""
