"""Files: pruned networks, interrupted runs, ONNX."""
