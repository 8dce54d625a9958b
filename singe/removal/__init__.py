"""Removal: neurons are cut out of tensors, single weights are masked; and tests that this works."""
