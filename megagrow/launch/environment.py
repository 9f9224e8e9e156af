"""What a job starts with: versions, GPUs, git states and the script, for the record of its start.

A family trains for weeks, and its node images, drivers and working trees change meanwhile. When two starts of a stage
differ, the records tell in what. Nothing here may keep a job from starting: what cannot be found out is left out.
"""

import functools
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import megagrow

_PACKAGES = ("megagrow", "torch", "megatron-core", "transformer-engine", "apex", "numpy", "wandb")
_PATIENCE_S = 10


def environment(script: Path | None = None) -> dict[str, str]:
    """Return what is known of this machine and its software, by name.

    Args:
        script: the sbatch script that runs the job; None for a job that runs without one.
    """
    return {**_machine(), **({} if script is None else {"script": str(script)})}


@functools.cache
def _machine() -> dict[str, str]:
    found = {"host": platform.node(), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # one line a GPU, as "NVIDIA H100 80GB HBM3, 580.159.04"; equal ones are counted
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    if gpus:
        found["gpus"] = "; ".join(f"{gpus.count(gpu)} x {gpu.strip()}" for gpu in dict.fromkeys(gpus))
    places = {"git": Path.cwd()}
    source = Path(megagrow.__file__).parents[1]
    if (source / "setup.py").is_file():  # git would otherwise describe the repository around a venv
        places["megagrow git"] = source
    for name, place in places.items():
        if state := _output("git", "-C", str(place), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"):
            found[name] = state
    return found


def _output(program: str, *arguments: str) -> str:
    """The program's output, or nothing if it is missing, fails or takes too long."""
    if shutil.which(program) is None:
        return ""
    try:
        child = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
    except OSError:
        return ""
    try:
        output, _ = child.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()  # and not waited for: nvidia-smi in front of a broken driver cannot even be killed
        return ""
    return output.strip() if child.returncode == 0 else ""
