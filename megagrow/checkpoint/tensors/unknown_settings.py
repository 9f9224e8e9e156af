"""Settings of a source that no table lists: a fork's, or a newer version's. They may change what the model computes.

One with a value that turns nothing on is passed over. Any other is named in a note, and refused where its name speaks
of something that changes a function: a scale, a multiplier, a cap, a bias, a norm, a gate, routing, positions.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megagrow.errors import CheckpointError

_SPEAKS_OF_THE_FUNCTION = re.compile(
    r"(re)?scal(e|es|ed|er|ing|ar)|mult|multipliers?|(soft|logits?)?cap(s|ped|ping|acity)?|(un)?bias(es|ed)?"
    r"|\w*norm(s|ed|alized?|alization)?|gat(e|es|ed|ing)|rout\w+|rope|rotary|yarn|mup|\w*softmax|\w*attention|attn"
)
_SHOWN = 8
"""How many unknown settings a note names."""


def refuse_suspects(
    unknown: Sequence[str], settings: Mapping[str, Any], where: str, whose: str, ignored: Collection[str] = ()
) -> None:
    """Raise CheckpointError if an unknown setting speaks of something that changes the function.

    Args:
        unknown: names of the settings that are unknown and not empty.
        settings: all settings by name.
        where: source of the settings, for errors.
        whose: of whom they are not, such as "Megatron-LM's".
        ignored: names that the user knows to be harmless.
    """
    suspects = [name for name in unknown if name not in ignored and _speaks_of_the_function(name)]
    if suspects:
        raise CheckpointError(
            f"{where}: {_assigned(settings, suspects)}: not {whose}, and by the name may change what the model "
            f"computes; if it does not, add --ignore-argument {_printable(suspects[0])}"
        )


def note_on_unknown(unknown: Sequence[str], settings: Mapping[str, Any], what: str, whose: str) -> tuple[str, ...]:
    """Return a note that names the unknown settings; none if there are none.

    Args:
        unknown: names of the settings that are unknown and not empty.
        settings: all settings by name.
        what: they are called, such as "argument".
        whose: of whom they are not.
    """
    if not unknown:
        return ()
    are = f"{what} is" if len(unknown) == 1 else f"{what}s are"
    return (f"{len(unknown)} {are} not {whose} and taken to be harmless: {_assigned(settings, unknown)}",)


def is_empty(value: Any) -> bool:
    """Whether a value turns nothing on: None, False, 0, "", or a collection of such values."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(is_empty(each) for each in value)
    return not value


def short_text(value: Any) -> str:
    """Return a value for people: on one line, printable and not long."""
    text = " ".join(_printable(str(value)).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _speaks_of_the_function(name: str) -> bool:
    """Whether a part of the name is a word for something that changes what a model computes."""
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
    return any(_SPEAKS_OF_THE_FUNCTION.fullmatch(word) for word in re.split(r"[^a-z]+", words))


def _assigned(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return `name=value` of each setting, as far as there is room for them."""
    text = ", ".join(f"{_printable(name)}={short_text(settings[name])}" for name in names[:_SHOWN])
    return text if len(names) <= _SHOWN else f"{text} and {len(names) - _SHOWN} more"


def _printable(text: str) -> str:
    """Return text of a checkpoint without characters that a terminal would obey."""
    return text if text.isprintable() else ascii(text)[1:-1]
