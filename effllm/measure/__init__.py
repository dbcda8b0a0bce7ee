"""Measuring quality and speed. Nothing here imports torch."""
