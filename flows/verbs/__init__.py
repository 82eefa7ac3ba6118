"""The verbs of the `tunesmith` command, a module for each group of its help."""
