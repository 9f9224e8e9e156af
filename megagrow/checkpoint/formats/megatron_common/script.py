"""Reads the flags of a `pretrain_gpt.py` command from a shell script, without running it.

Assignments, arrays and `${NAME:-default}` of the script itself are followed; what it gets from its environment, from
its own arguments or from another program is unknown, and an error where it is needed.
"""

import re
import shlex
from pathlib import Path
from typing import Any

from megagrow.errors import CheckpointError
from megagrow.files.bounded import read_small

_MAX_BYTES = 1 << 20
_ARRAY = re.compile(r"^[ \t]*(?:export[ \t]+)?(\w+)\+?=\((.*?)\)[ \t]*$", re.MULTILINE | re.DOTALL)
_SCALAR = re.compile(r"^[ \t]*(?:export[ \t]+|local[ \t]+)?(\w+)=([^\n(].*|)$", re.MULTILINE)
_USE = re.compile(r"\$(?:\{(\w+)(?:\[[@*]\])?(?::?-([^}$]*))?\}|(\w+))")
_PROGRAM = re.compile(r"pretrain_\w+\.py")
_OPENS, _CLOSES = re.compile(r"[ \t]*(?:if|for|while|until|case|select)\b"), re.compile(r"[ \t]*(?:fi|done|esac)\b")
_DEPTH = 20
_OPPOSITES = {"disable_bias_linear": "add_bias_linear", "no_position_embedding": "add_position_embedding"}
"""Flags that switch an argument of another name off; all others that begin with `no_` switch off what follows."""


def arguments_of_script(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments that a script gives to Megatron-LM, by their names in its Namespace, and notes.

    What stands in a condition or a loop is not followed; a note names flags there. A flag without a value is True, or
    False where it switches something off. Values that are numbers are numbers, and several values are a list. A value
    that the script does not tell is text with a `$` in it.

    Raises:
        CheckpointError: the file cannot be read as a script, or gives no flags.
    """
    try:
        plain, conditional = _parted(read_small(path, _MAX_BYTES).decode().replace("\\\n", " "))
        words = _command(_expanded(plain))
    except (UnicodeDecodeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a shell script that can be read: {error}") from None
    found = _flags(words)
    if "num_layers" not in found:
        raise CheckpointError(f"{path}: no flags of pretrain_gpt.py are in it: --num-layers is missing")
    hidden = sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", conditional)))
    notes = [f"{', '.join(hidden)}: in a condition or a loop, which is not followed"] if hidden else []
    return found, notes


def _parted(text: str) -> tuple[str, str]:
    """The lines outside conditions and loops, and those inside; comments are left out."""
    outside, inside, depth = list[str](), list[str](), 0
    for line in text.splitlines():
        line = _without_comment(line)
        opens = bool(_OPENS.match(line)) and not re.search(r"[;\s](?:fi|done|esac)\s*$", line)
        depth += opens
        (inside if depth else outside).append(line)
        depth -= bool(_CLOSES.match(line)) and depth > 0
    return "\n".join(outside), "\n".join(inside)


def _without_comment(line: str) -> str:
    """A line up to a # that begins a word and is not in quotes."""
    for match in re.finditer(r"(?:^|\s)#", line):
        before = line[: match.start()]
        if before.count('"') % 2 == 0 and before.count("'") % 2 == 0:
            return before
    return line


def _expanded(text: str) -> str:
    """The script with its own variables replaced, and without their assignments."""
    known: dict[str, str] = {}
    for name, content in _ARRAY.findall(text):
        known[name] = " ".join([*([known[name]] if name in known else []), *shlex.split(content)])
    rest = _ARRAY.sub("", text)
    for name, assigned in _SCALAR.findall(rest):
        own = re.fullmatch(rf"\$\{{{name}:?-([^}}]*)\}}", assigned.strip().strip('"'))  # NAME=${NAME:-default}
        known.setdefault(name, own[1] if own else " ".join(shlex.split(assigned)))
    rest = _SCALAR.sub("", rest)

    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        return known.get(name, match[0] if default is None else default)

    rest = rest if rest.strip() else " ".join(known.values())
    for _ in range(_DEPTH):
        again = _USE.sub(value, rest)
        if again == rest or len(again) > _MAX_BYTES:
            break
        rest = again
    return rest


def _command(text: str) -> list[str]:
    """The words after the program's name; without one, all words of the text."""
    for line in text.splitlines():
        if match := _PROGRAM.search(line):
            return shlex.split(re.split(r"\s(?:\||>|2>|&)", line[match.end() :])[0].replace('"', " ").replace("'", " "))
    return shlex.split(text.replace('"', " ").replace("'", " "))


def _flags(words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    name, values = "", list[str]()
    for word in [*words, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name:
            found |= _argument(name, values)
        word, _, value = word[2:].partition("=")
        name, values = word.replace("-", "_"), [value] if value else []
    return found


def _argument(name: str, values: list[str]) -> dict[str, Any]:
    if not values:
        if name in _OPPOSITES:
            return {_OPPOSITES[name]: False}
        return {name[3:]: False} if name.startswith("no_") else {name: True}
    read = [_number(value) for value in values]
    return {name: read[0] if len(read) == 1 else read}


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
