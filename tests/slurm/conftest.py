"""One Slurm for all tests of this directory, and the environment that jobs inherit from their submitter."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """A real Slurm of two nodes; these tests need it, so they fail on a machine that cannot run one."""
    if reason := cluster.missing():
        pytest.fail(reason)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with cluster.running():
        yield
