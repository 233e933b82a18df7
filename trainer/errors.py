"""Mistakes of the user, told in one message."""


class UserError(Exception):
    """What was wanted, what came and the remedy; the command line prints it without a traceback."""
