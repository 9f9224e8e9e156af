"""A source that is written to during a conversion, a target that a kill left untracked, and a disk that is full."""

from pathlib import Path

import pytest

from megagrow.checkpoint.directory import iterations
from megagrow.config import GrowthConfig
from tests.reference.conversions import convert, small_source, target
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_source(tmp_path / "small")


# issue 12: D16
def test_a_conversion_killed_before_it_moved_the_tracker_moves_it_when_it_is_repeated(
    source: Path, tmp_path: Path
) -> None:
    """A reshard keeps its iteration, here 10, and the target's directory has an older one."""
    save, reshard = tmp_path / "same", target(shape(SMALL), stage="same", growth=GrowthConfig())
    write_checkpoint(save, shape(SMALL), random_state(shape(SMALL)), iteration=5)
    convert(source, save, reshard)
    assert iterations.read_tracker(save) == 10 and iterations.published(save) == [5, 10]
    iterations.write_tracker(save, 5)  # as the kill leaves it
    convert(source, save, reshard)
    assert iterations.read_tracker(save) == 10
