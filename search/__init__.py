"""Optuna's side: the space, the memory budget and the study. The flow in `flows/` runs the trials."""
