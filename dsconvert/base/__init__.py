"""What knows nothing of networks: errors and words, files, processes, threads, compiled loops, ONNX nodes."""
