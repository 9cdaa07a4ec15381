"""The one error type for bad input."""


class SimsError(Exception):
    """Bad input or a state that needs the user: one sentence saying what, found where, and what to do."""
