"""How fast the engine is: its methods, its baselines and its subjects; speed.py runs it."""
