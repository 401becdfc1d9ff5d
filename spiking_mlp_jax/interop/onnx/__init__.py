"""ONNX files of folded and integer networks."""
