"""The command line as a process, as users run it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def megagrow(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `megagrow ARGUMENTS`, and return it with its exit code and both outputs; errors are on one line."""
    found = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "150", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "megagrow", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, timeout=300, env=found)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The error line of a command that a user can correct; AssertionError if there is none."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("megagrow: error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]
