"""The remaining layers, refitted by least squares so that the network answers like the unpruned one."""
