"""Prepare: from rows to tokens."""
