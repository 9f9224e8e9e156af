"""The name of Megatron's tracker: the file in a directory of checkpoints that names the newest iteration.

It has a module of its own because a conversion looks for the tracker before anything large is imported.
"""

TRACKER = "latest_checkpointed_iteration.txt"
