"""Fuse: merge the adapter into the base model, proven equal."""
