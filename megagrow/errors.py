"""The errors that a person can mend.

Whatever goes wrong because of what a user gave us (a yaml, a path, a checkpoint, a full disk) is raised as a
`UserError`. The command line prints its one line and leaves with `exit_code`; anything else is our own bug
and keeps its traceback.
"""


class UserError(ValueError):
    """One clear line: the value, the place where it stands, and what would do."""

    exit_code = 2


class ConfigError(UserError):
    """A family.yaml that cannot be right."""


class DataError(UserError):
    """A corpus or a tokenizer that is missing, empty or unreadable."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged, foreign or unsafe."""


class GrowthError(UserError):
    """A growth step that no function-preserving map of the wanted kind can make."""


class LaunchError(UserError):
    """A job that could not be started or that failed."""
