"""megagrow's inspect and diff under the name of Megatron-LM's tools/checkpoint/checkpoint_inspector.py.

    python tools/checkpoint/checkpoint_inspector.py inspect runs/a
    python tools/checkpoint/checkpoint_inspector.py compare runs/a runs/b

Everything else: `megagrow inspect --help`, `megagrow diff --help`.
"""

import argparse
import sys

from megagrow.cli.main import main

_VERBS = {"inspect": "inspect", "compare": "diff", "diff": "diff"}


def arguments(given: list[str]) -> list[str]:
    """The command line of megagrow that does what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=sorted(_VERBS))
    options, further = parser.parse_known_args(given)
    return [_VERBS[options.verb], *further]


if __name__ == "__main__":
    sys.argv = [sys.argv[0], *arguments(sys.argv[1:])]
    main()
