"""The packages that a machine may lack, and what installs each: `setup.py` has the same extras.

A machine that only converts may have been given megagrow without Megatron-Core. Whoever needs a missing package is
told the command that brings it.
"""

import importlib.util

from megagrow.errors import UserError

INSTALL = {
    "megatron": "megagrow",
    "matplotlib": "megagrow[plots]",
    "tensorboard": "megagrow[tensorboard]",
    "tokenizers": "megagrow[hf]",
    "pyarrow": "megagrow[corpus]",
    "zstandard": "megagrow[corpus]",
}
"""What to install for each package, by the name that Python imports."""

NAMES = {"megatron": "megatron-core"}
"""Names on PyPI that differ from those that Python imports."""


def is_installed(package: str) -> bool:
    """Whether a package could be imported; imports nothing."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # forbidden by an import hook or by None in sys.modules
        return False


def how_to_install(package: str) -> str:
    """The command that installs a package of `INSTALL`, quoted for every shell."""
    return f"pip install '{INSTALL[package]}'"


def missing(package: str, purpose: str) -> UserError:
    """Return the error for a purpose that a package is missing for."""
    name = NAMES.get(package, package)
    return UserError(f"{purpose} needs {name}, which is not installed here: {how_to_install(package)}")
