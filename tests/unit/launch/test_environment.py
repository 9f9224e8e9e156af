"""The record of a job's start tells what it started with, and nothing of that keeps a job from starting."""

import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from megagrow.launch import environment as module
from megagrow.launch.environment import environment


@pytest.fixture(autouse=True)
def afresh() -> None:
    module._machine.cache_clear()


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_versions_and_the_script_are_told(tmp_path: Path) -> None:
    found = environment(tmp_path / "train.sbatch")
    assert found["torch"] == metadata.version("torch") and found["megatron-core"] == metadata.version("megatron-core")
    assert found["script"] == str(tmp_path / "train.sbatch")
    assert "script" not in environment()


def test_gpus_are_counted_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(
        tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H100, 580.1'; echo 'NVIDIA H100, 580.1'; echo 'NVIDIA T4, 580.1'"
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert environment()["gpus"] == "2 x NVIDIA H100, 580.1; 1 x NVIDIA T4, 580.1"


def test_the_git_state_is_the_commit_and_whether_it_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "family.yaml").write_text("name: a")
    git("add", ".")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "v1")
    monkeypatch.chdir(tmp_path)
    assert environment()["git"] == git("rev-parse", "HEAD")
    (tmp_path / "family.yaml").write_text("name: b")
    module._machine.cache_clear()
    assert environment()["git"] == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.parametrize("text", ["exit 9", "sleep 60", "echo partial; exit 1"])
def test_a_program_that_fails_or_hangs_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.5)
    program(tmp_path / "bin", "nvidia-smi", f"PATH=/usr/bin:/bin\n{text}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = environment()
    assert "gpus" not in found and "git" not in found and "python" in found
