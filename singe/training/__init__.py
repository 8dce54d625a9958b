"""Batches, steps of training, and their effect on a network."""
