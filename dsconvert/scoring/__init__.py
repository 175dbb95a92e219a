"""Accuracy, size and latency of models; what is inside knows nothing of how they were made."""
