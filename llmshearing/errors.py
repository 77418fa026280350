"""The one base of every error that a user of the package can cause and can fix, and the exit codes of a command."""


class ShearingError(ValueError):
    """Bad input. The message names the key, file or tensor, its value, and what would be right.

    Command-line mains catch it, log the message without a traceback and exit with its ``exit_code``.
    """

    exit_code = 1


class Stopped(ShearingError):
    """A signal asked to stop; the state is saved, and the same command goes on from it (with autoresume)."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class RankLost(ShearingError):
    """Another rank has died or stalled; the run goes on from its newest checkpoint when it is started again."""

    exit_code = 76  # EX_PROTOCOL: the other side failed
