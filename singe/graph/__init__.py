"""The network as data: a short list of ATen operators, who owns each channel, and where to cut."""
