"""Serving ONNX folders over HTTP: a scheduler, a worker process per model, and the APIs that people already call."""
