"""The option --from-megatron of the verb plan: a family.yaml of a run of Megatron-LM."""

from pathlib import Path
from typing import Any

import yaml

from megagrow.errors import CheckpointError, LaunchError


def show_family(source: Path, more: list[str]) -> None:
    """Print the family.yaml of a run, checked as a whole, with notes on what it does not carry as comments.

    Args:
        source: a shell script, or a checkpoint of Megatron-LM.
        more: arguments to add, NAME=VALUE, by Megatron-LM's names.

    Raises:
        CheckpointError: the source does not tell what is needed.
        ConfigError: what it tells is no family.
    """
    from megagrow.checkpoint.formats import open_checkpoint, resolve_directory
    from megagrow.checkpoint.formats.megatron_common import arguments_of_script, family_of_arguments
    from megagrow.config import load_text

    load, notes = None, list[str]()
    if source.is_dir():
        load = resolve_directory(source)
        arguments = open_checkpoint(load).common.get("args")
        if not isinstance(arguments, dict):
            raise CheckpointError(f"{load}: a checkpoint without the arguments of its run; give the run's script")
        load = source.resolve()
    elif source.is_file():
        arguments, notes = arguments_of_script(source)
    else:
        raise LaunchError(f"--from-megatron {source}: neither a script nor a checkpoint")
    tree, more_notes = family_of_arguments({**arguments, **_added(more)}, source, load=load)
    text = yaml.safe_dump(tree, sort_keys=False, width=110)
    load_text(text, [])  # what is printed is a family
    print(f"# A run of Megatron-LM, read from {source}; add a stage for each larger model.")
    for note in (*notes, *more_notes):
        print(f"# not carried: {note}")
    print(text, end="")


def _added(more: list[str]) -> dict[str, Any]:
    found = {}
    for text in more:
        name, equals, value = text.partition("=")
        if not equals:
            raise LaunchError(f"--from-megatron: {text}: not an argument to add; write NAME=VALUE, as vocab_size=50257")
        found[name.replace("-", "_")] = yaml.safe_load(value)
    return found
