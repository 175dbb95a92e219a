"""Parts that know nothing of networks: errors and texts, files, processes, threads, compiled loops, ONNX nodes."""
