"""A trained student as ONNX or torch.export program, in float32 or 8 bits."""
