"""Measure models: accuracy, agreement, latency, memory, and what `detect` finds.

It does not matter how they were made.
"""
