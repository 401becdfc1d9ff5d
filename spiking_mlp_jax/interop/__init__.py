"""Other formats: official weights, Hugging Face Hub, ONNX, StableHLO, NIR."""
