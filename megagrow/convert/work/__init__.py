"""Workers that share only a directory: its journal, and the units of files that they make."""

from megagrow.convert.work.disk import is_disk_full
from megagrow.convert.work.execute import (
    ConversionRun,
    Progress,
    RunOptions,
    allowed_piece_values,
    check_alone,
    checked_files,
    drop_journal,
    make_files,
    publish_target,
)
from megagrow.convert.work.journal import CHECKED, DIRECTORY, FINISH, SKIPPED, Journal
from megagrow.convert.work.memory import piece_values
from megagrow.convert.work.rank import worker_rank

__all__ = [
    "CHECKED",
    "ConversionRun",
    "DIRECTORY",
    "FINISH",
    "Journal",
    "Progress",
    "RunOptions",
    "SKIPPED",
    "allowed_piece_values",
    "check_alone",
    "checked_files",
    "drop_journal",
    "is_disk_full",
    "make_files",
    "piece_values",
    "publish_target",
    "worker_rank",
]
