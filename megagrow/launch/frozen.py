"""The family as it was launched: the queued jobs read this copy, `<save>/jobs/family.yaml`.

An edit of the user's own file therefore takes effect at the next launch. What may be edited is decided by
`megagrow.history`.
"""

from pathlib import Path

from megagrow.config import Family, to_yaml
from megagrow.config.paths import FamilyPaths
from megagrow.files.atomic import write_atomically


def freeze(family: Family) -> Path:
    """Write the family.yaml that the jobs read; return its path."""
    path = frozen_yaml(family)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path, f"# The family as it was last launched. Edit your own family.yaml, not this copy.\n{to_yaml(family)}"
    )
    return path


def frozen_yaml(family: Family) -> Path:
    """Path of the family.yaml that the jobs read."""
    return FamilyPaths(family).jobs / "family.yaml"
