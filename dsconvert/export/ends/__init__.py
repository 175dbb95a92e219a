"""How an ONNX file begins and ends: the image, decoding, suppression."""
