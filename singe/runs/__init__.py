"""Algorithm 1 of the paper, on neurons and on single weights, from the checked arguments to the result."""
