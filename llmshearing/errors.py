"""The one base of every error that a user of the package can cause and can fix."""


class ShearingError(ValueError):
    """Bad input. The message names the key, file or tensor, its value, and what would be right.

    Command-line mains catch it, log the message without a traceback and exit with 1.
    """
