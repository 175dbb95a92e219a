"""Post-training conversion of YOLOv5 detectors to DSConv (arXiv 1901.01928) with integer ONNX export."""

import os

__version__ = "0.1.0"

# OpenCV reads these when it is first imported, which is after this. A 100 kB file may declare an image of a billion
# pixels: beyond 134 million (400 MB decoded) OpenCV refuses. What it thinks of broken images is said by our own errors.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 27))
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
