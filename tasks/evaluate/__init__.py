"""Evaluate: the fixed test rows, base beside tuned."""
