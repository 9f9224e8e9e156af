"""A sealed checkpoint on disk, and a copy of it for each test to damage or forge."""

import shutil
from pathlib import Path

import pytest

from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

FILES = [".metadata", "__0_0.distcp", "common.pt", "integrity.json", "megagrow.json", "metadata.json"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed checkpoint that tests copy."""
    save = tmp_path_factory.mktemp("pristine")
    path = write_checkpoint(save, shape(SMALL), random_state(shape(SMALL), optimizer=False))
    assert sorted(file.name for file in path.iterdir()) == FILES
    return path


@pytest.fixture
def path(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "iter_0000010"))
