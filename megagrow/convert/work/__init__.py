"""Workers that share nothing but a directory: its journal, and the units of files that they make."""

from megagrow.convert.work.execute import (
    Progress,
    RunOptions,
    allowed_piece_values,
    check_alone,
    check_made,
    check_unchanged,
    drop_journal,
    make_files,
    publish_target,
)
from megagrow.convert.work.journal import CHECKED, DIRECTORY, FINISH, Journal, wait
from megagrow.convert.work.memory import piece_values
from megagrow.convert.work.place import worker_rank

__all__ = [
    "CHECKED",
    "DIRECTORY",
    "FINISH",
    "RunOptions",
    "Journal",
    "Progress",
    "check_alone",
    "check_made",
    "allowed_piece_values",
    "check_unchanged",
    "drop_journal",
    "make_files",
    "piece_values",
    "worker_rank",
    "publish_target",
    "wait",
]
