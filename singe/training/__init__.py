"""Batches, steps of training, and what they do to a network."""
