"""`megagrow status` shows what training has set aside when it went back."""

import json
from pathlib import Path
from typing import Any

import pytest

from megagrow.launch import slurm
from tests.distributed.ranks.families import LLAMA, stage, write_family, write_text


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(slurm, "is_available", lambda: False)
    stages = [stage("small", LLAMA), stage("large", LLAMA)]
    return write_family(tmp_path / "family", write_text(tmp_path / "text.jsonl", 1), stages)


def status(file: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    from megagrow.cli.family.cluster import show_status

    show_status(file, [], None, as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# issue 12: D16
def test_status_names_the_stage_the_iterations_and_the_directory(
    family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(family, capsys)["footnotes"] == []
    aside = family.with_suffix("") / "small" / "checkpoints" / "ahead"
    for number in (40, 50, 60):
        (aside / f"iter_{number:07d}").mkdir(parents=True)
    (note,) = status(family, capsys)["footnotes"]
    assert note.startswith("small: 3 checkpoint(s) at iteration 40 to 60 were ahead when training went back")
    assert str(aside) in note
    for number in (40, 50):
        (aside / f"iter_{number:07d}").rmdir()
    (note,) = status(family, capsys)["footnotes"]
    assert note.startswith("small: 1 checkpoint(s) at iteration 60 were ahead")
