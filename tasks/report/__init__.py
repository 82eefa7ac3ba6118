"""Report: one page a run."""
