"""The network as data: a short list of ATen operators, the owner of each channel, and where to cut."""
