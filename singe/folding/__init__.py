"""Batch norms folded into the layers around them."""
