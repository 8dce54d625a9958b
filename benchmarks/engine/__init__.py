"""How fast the engine is: its ways, what it is compared with, and what is looked at; speed.py runs it."""
