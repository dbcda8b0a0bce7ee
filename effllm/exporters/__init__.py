"""From a transformers model to ONNX: trace, check, quantise, lay out."""
