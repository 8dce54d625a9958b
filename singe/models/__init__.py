"""What holds for any PyTorch model: how it is called, copied and compared, and left as it was."""
