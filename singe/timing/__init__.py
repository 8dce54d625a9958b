"""How long networks take, and their modules."""
