"""How relevant neurons and single weights are, computed fast; what relevance is, is told by ``singe.criteria``."""
