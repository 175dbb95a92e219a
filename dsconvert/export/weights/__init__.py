"""Layouts, and how weights are spelled in each."""
