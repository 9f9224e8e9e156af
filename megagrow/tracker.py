"""The name of Megatron's tracker: the file in a directory of checkpoints that names the newest iteration.

It has a module of its own because a conversion looks for the tracker before anything large is imported.
"""

TRACKER = "latest_checkpointed_iteration.txt"
MAX_TRACKER = 100
"""Bytes of the file that are read."""
MAX_ITERATION = 10**15


def iteration_in(text: str) -> int | None:
    """Return the iteration that a tracker contains; None if it contains anything else."""
    text = text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) < MAX_TRACKER):
        return None
    return iteration if (iteration := int(text)) <= MAX_ITERATION else None
