"""Post-training conversion of YOLOv5 detectors to DSConv (arXiv 1901.01928) with integer ONNX export."""

__version__ = "0.1.0"
