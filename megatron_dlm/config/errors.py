"""The mistakes a user can make.

A `UserError` is not a bug: whoever raises it has found bad input and knows what the user should do. The commands print
it as one sentence and exit with code 2; nothing else in the package prints a sentence and exits. Anything that is not a
`UserError` keeps its traceback, because it is ours.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one plain sentence or two: what is wrong, with the values, and what to do."""


class ConfigError(UserError):
    """A flag, a YAML key or a combination of them that cannot work."""


class DataError(UserError):
    """A data file that is missing, or a line in it that cannot be read."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or does not fit the model."""


class DependencyError(UserError):
    """An optional package that was asked for and is not installed."""


class TrainingError(UserError):
    """A run that cannot go on: its loss or its gradient is not a finite number."""
