"""Faults a person can mend, told apart from faults of the program."""


class InputError(Exception):
    """Something given to Tunesmith is wrong; the command line prints the message and exits with 2.

    The message names the value and its place (file, line, key), the limit or the choices, and the
    next action.
    """


class OutageError(InputError):
    """Something outside, as the hub, did not answer; it may pass, or a person goes online."""


class StepError(Exception):
    """A step could not be done; the command line prints the message and exits with 1."""
