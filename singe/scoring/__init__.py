"""How relevant neurons and single weights are, computed fast; ``singe.criteria`` defines relevance."""
