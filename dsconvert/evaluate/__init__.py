"""Accuracy, size and speed of a model."""
