"""Workers that share nothing but a directory: its journal, and the units of files that they make."""

from megagrow.convert.work.execute import (
    How,
    Progress,
    check_alone,
    check_made,
    check_memory,
    check_unchanged,
    drop_journal,
    make,
    publish,
)
from megagrow.convert.work.journal import CHECKED, DIRECTORY, FINISH, Journal, wait
from megagrow.convert.work.memory import piece_values
from megagrow.convert.work.place import place

__all__ = [
    "CHECKED",
    "DIRECTORY",
    "FINISH",
    "How",
    "Journal",
    "Progress",
    "check_alone",
    "check_made",
    "check_memory",
    "check_unchanged",
    "drop_journal",
    "make",
    "piece_values",
    "place",
    "publish",
    "wait",
]
