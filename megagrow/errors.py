"""Errors the user can fix.

Every failure caused by the user's input or machine (a yaml, a path, a checkpoint, a full disk) is raised as a
`UserError`. The command line prints it as one line and exits with `exit_code`; any other exception is a bug in
megagrow and keeps its traceback.
"""


class UserError(ValueError):
    """One clear line: the wrong value, where it is, and what would work."""

    exit_code = 2


class ConfigError(UserError):
    """A family.yaml that is invalid."""


class DataError(UserError):
    """A corpus or a tokenizer that is missing, empty or unreadable."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged, foreign or unsafe."""


class GrowthError(UserError):
    """A growth step that the requested operators cannot make."""


class LaunchError(UserError):
    """A job that could not start or that failed."""


class NodeError(LaunchError):
    """A node that lacks what a job was given there, such as its GPUs; another attempt may get another node."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h: a job that ended so is tried again, one with a user's error is not
