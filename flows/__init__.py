"""What a person starts: the `tunesmith` command and the Prefect flows behind it."""
