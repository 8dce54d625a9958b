"""What is left of a network, made to put out what the unpruned one does, by least squares."""
