"""The one exception that a user may see: its text is a single clear line."""


class Fail(Exception):
    """What the user can mend: the command line prints it, without a traceback, and exits with 2."""
