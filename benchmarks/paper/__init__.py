"""The paper's tables and figures on real data, beside its peers; run by ``reproduce.py``."""
