"""What is removed: which neurons, cut out of tensors, or which single weights, masked; and whether that goes well."""
