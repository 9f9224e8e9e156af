"""A disk that fills up during a save: one error line, earlier checkpoints stay, and the run can be resumed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagrow.checkpoint.directory import iterations
from tests.distributed.ranks.families import stage, write_family, write_text

ROOT = Path(__file__).parents[3]
MODEL = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 8, "num_query_groups": 4}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for two checkpoints of the tiny model (1.5 MB each), not for three."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def megagrow(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megagrow", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_save_on_a_full_disk_is_one_line_and_the_run_goes_on(
    tmp_path: Path, small_disk: Path, background: str
) -> None:
    save = tmp_path / "family"
    file = str(write_family(save, write_text(tmp_path / "text.jsonl"), [stage("one", MODEL)]))
    checkpoints = save / "one" / "checkpoints"
    options = ["checkpoint.save_interval=5", f"checkpoint.async_save={background}"]
    assert megagrow("data", file).returncode == 0
    checkpoints.parent.mkdir()
    checkpoints.symlink_to(small_disk, target_is_directory=True)

    answer = megagrow("train", file, "--stage", "one", *options)
    assert answer.returncode == 2, answer.stderr
    errors = [line for line in answer.stderr.splitlines() if line.startswith("megagrow: error:")]
    assert len(errors) == 1 and str(checkpoints) in errors[0]
    assert "disk is full" in errors[0] or "No space left" in errors[0]
    kept = iterations.published(small_disk)
    assert kept and kept[0] == 5 and kept[-1] < 20

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    answer = megagrow("train", file, "--stage", "one", *options)
    assert answer.returncode == 0, answer.stderr
    assert iterations.published(small_disk)[-1] == 20
    assert not list(small_disk.glob(".iter_*"))
