"""How an ONNX file begins and ends: image input, box decoding and non-maximum suppression."""
