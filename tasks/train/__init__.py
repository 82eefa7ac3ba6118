"""Train: base model and prepared data in, the best adapter out."""
