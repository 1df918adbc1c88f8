"""The mistakes a user can make.

A `UserError` is not a bug: whoever raises it has found bad input and knows what the user should do. The commands print
it as one sentence and exit with code 2; nothing else in the package prints a sentence and exits. Anything that is not a
`UserError` keeps its traceback, because it is ours.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one plain sentence or two: what is wrong, with the values, and what to do.

    Attributes:
        told: whether another rank tells it.
        rank, host: who has found it; None: whoever tells it, and this host.
        code: exit code of the command.
    """

    told = False
    rank: int | None = None
    host: str | None = None
    code = 2


class ConfigError(UserError):
    """A flag, a YAML key or a combination of them that cannot work."""


class DataError(UserError):
    """A data file that is missing, or a line in it that cannot be read."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or does not fit the model."""


class DependencyError(UserError):
    """An optional package that was asked for and is not installed."""


class TrainingError(UserError):
    """A run that cannot go on: its loss is not a finite number, or nothing is left to learn from."""


class ResourceError(UserError):
    """The machine has no room left, in memory or on a disk."""


class PeerError(UserError):
    """Another process of the job has ended, or cannot be reached. Whoever starts jobs may try again: the exit code is
    that of a failure that may pass (EX_TEMPFAIL)."""

    code = 75


class Interrupted(Exception):
    """A signal ended the run; what there was to save is saved. The command exits with 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum
