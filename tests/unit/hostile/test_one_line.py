"""What a user gets is one line: for a target that cannot be, a damaged file, a strange name; and never an escape."""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megagrow.checkpoint.directory import iterations
from megagrow.cli.output import show_error
from megagrow.convert.early import readahead
from megagrow.log import printable, setup
from megagrow.tracker import TRACKER
from tests.unit.hostile.conftest import Answer
from tests.unit.hostile.opcodes import archive, named, text, whole

Command = Callable[..., Answer]
Refused = Callable[..., str]
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m"
"""Sets a terminal's title, clears it, and writes from right to left."""
TP2 = "parallel.tensor_model_parallel_size=2"


def places(root: Path) -> dict[str, tuple[Path, str]]:
    """Targets that cannot be, and what the line says."""
    (root / "file").write_text("x")
    (root / "dangling").symlink_to(root / "nowhere" / "x")
    (root / "loop").symlink_to(root / "loop")
    return {
        "a file": (root / "file", "file: (not a directory|already exists)"),
        "below a file": (root / "file" / "x", "file: not a directory"),
        "a dangling link": (root / "dangling", "dangling: a link to .*, which does not exist"),
        "below a dangling link": (root / "dangling" / "x", "dangling: a link to .*, which does not exist"),
        "a device": (Path("/dev/null"), "/dev/null: (not a directory|already exists)"),
        "too long": (root / ("x" * 300), "File name too long"),
        "too long in all": (root.joinpath(*["y" * 200] * 30), "File name too long"),
        "a circle of links": (root / "loop" / "x", "Too many levels of symbolic links"),
        "not to be made": (Path("/proc/megagrow"), "/proc/"),
        "no UTF-8": (root / os.fsdecode(b"\xff"), "not UTF-8"),
    }


# issue 12: C13
@pytest.mark.parametrize("to", ["torch_dist", "huggingface", "legacy"])
def test_a_target_that_cannot_be_is_one_line(own: Path, tmp_path: Path, one_line: Refused, to: str) -> None:
    import re

    for name, (place, expected) in places(tmp_path).items():
        extra = [] if to == "huggingface" else [TP2]
        assert re.search(expected, one_line("convert", own, place, *extra, "--to", to)), name
    assert not list(tmp_path.rglob(".*.converting")), "nothing is left behind"


# issue 12: C13
def test_a_target_on_a_file_system_that_is_read_only_is_one_line(own: Path, one_line: Refused) -> None:
    """/sys allows nobody to make a directory, whoever asks."""
    assert "/sys/kernel/" in one_line("convert", own, "/sys/kernel/megagrow", TP2)


# issue 12: C13
@pytest.mark.parametrize("option", ["--dry-run", "--overwrite"])
def test_it_is_refused_before_any_work(own: Path, tmp_path: Path, one_line: Refused, option: str) -> None:
    (tmp_path / "file").write_text("x")
    assert "file: not a directory" in one_line("convert", own, tmp_path / "file", TP2, option)
    assert (tmp_path / "file").read_text() == "x"


# issue 12: C13
@pytest.mark.parametrize("content", [b"9" * 5000, b"\xff" * 5000, b"../../etc", b"\x1b[31m", "1\u0662".encode(), b""])
def test_a_tracker_of_anything_is_one_line(
    own: Path, one_line: Refused, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (own.parent / TRACKER).write_bytes(content)
    assert f"{TRACKER}: contains " in one_line("inspect", own.parent)
    assert readahead._files(own.parent) == []


# issue 12: C13
def test_a_sparse_tracker_is_not_read(own: Path, one_line: Refused) -> None:
    os.truncate(own.parent / TRACKER, 8 << 30)
    assert f"{TRACKER}: contains " in one_line("inspect", own.parent)


# issue 12: C13
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/".join(["y"] * 5000), "\ud800", ESCAPE, "..", ".", ""])
def test_a_strange_file_name_in_an_index_is_one_line(path: Path, one_line: Refused, name: str) -> None:
    content = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(content.replace(text("__0_0.distcp"), text(name)))
    line = one_line("inspect", path)
    assert "refused: points outside its directory, or is no file name" in line or "missing" in line or "name is" in line


# issue 12: C13
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", ESCAPE + ".safetensors", "\ud800.safetensors", "n" * 300_000])
def test_a_strange_file_name_in_an_index_of_a_model_is_one_line(model: Path, one_line: Refused, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name}}))
    assert len(one_line("inspect", model)) < 5000


# issue 12: C13
def test_strange_names_in_checksums_are_one_line(own: Path, one_line: Refused, tmp_path: Path) -> None:
    whole_one = json.loads((own / "integrity.json").read_text())
    for name in ("a\0b", "x" * 300, ESCAPE, "../../etc/passwd", "\ud800"):
        entry = {"size": 3, whole_one["algorithm"]: "0"}
        (own / "integrity.json").write_text(json.dumps({**whole_one, "files": {name: entry}}))
        one_line("convert", own, tmp_path / "target", TP2)


# issue 12: C13
def test_escape_sequences_in_names_reach_no_terminal(path: Path, here: Command) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for key in ("decoder.final_layernorm.weight",):
        strange = f"{key}.{ESCAPE}.[red]x[/red]"
        metadata.state_dict_metadata[strange] = metadata.state_dict_metadata[key]
        metadata.storage_data |= {
            type(index)(strange, index.offset): place
            for index, place in list(metadata.storage_data.items())
            if index.fqn == key
        }
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    other = Path(shutil.copytree(path, path.parent / "other"))
    for arguments in (("inspect", path), ("inspect", path, "--tensors"), ("diff", path, other, "--all"),
                      ("inspect", path, "--tensors", "--json")):  # fmt: skip
        answer = here(*arguments)
        assert answer.code in (0, 1) and all(line.isprintable() for line in answer.out.splitlines()), arguments
    listed = here("inspect", path, "--tensors").out
    assert r"\x1b]0;owned\x07\x1b[2J\u202e\x9b31m" in listed and "[red]x[/red]" in listed


# issue 12: C13
def test_escape_sequences_in_errors_notes_and_logs_reach_no_terminal(
    path: Path, one_line: Refused, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = Path(path.rename(path.with_name(ESCAPE)))
    (strange / "common.pt").unlink()
    assert r"\x1b]0;owned" in one_line("inspect", strange)
    show_error(ESCAPE)
    show_error("x" * 100_000)
    monkeypatch.setattr(logging.getLogger("megagrow"), "handlers", [])
    setup()
    logging.getLogger("megagrow.test").error("a %s\nb", ESCAPE)
    logging.getLogger("megagrow").propagate = True
    said = capfd.readouterr().err
    assert "\x1b" not in said and "\u202e" not in said and len(said) < 10_000 and "31m\nb" in said
    assert printable("plain ä 漢") == "plain ä 漢"


# issue 12: C13
@pytest.mark.parametrize(
    "content",
    [
        archive(whole(named("torch", "device") + pickle.NONE + pickle.BUILD)),
        archive(whole(named("os", "system") + text("x") + pickle.TUPLE1 + pickle.REDUCE)),
        archive(whole(named("torch._utils", "_rebuild_tensor_v3") + pickle.EMPTY_TUPLE + pickle.REDUCE)),
        archive(whole(pickle.NONE)),
        whole(pickle.NONE),
        b"junk",
        b"",
    ],
)
def test_torchs_advice_never_reaches_a_user(path: Path, one_line: Refused, content: bytes) -> None:
    """torch says: set weights_only to False if you trust the file. `one_line` looks for that."""
    (path / "common.pt").write_bytes(content)
    assert "common.pt: " in one_line("inspect", path)


# issue 12: C13
@pytest.mark.parametrize("value", ["three", -1, 1.5, None, [1], {"a": 1}, 1 << 80])
def test_a_common_state_of_anything_is_one_line(path: Path, here: Command, value: object) -> None:
    for key in ("iteration", "args", "optimizer", "content_metadata", "huggingface", "rng_state"):
        (path / "common.pt").write_bytes(archive(pickle.dumps({"iteration": 10, key: value}, protocol=2)))
        answer = here("inspect", path)
        assert answer.code in (0, 2) and len(answer.err.splitlines()) == int(answer.code == 2), (key, answer)


# issue 12: C13
def test_published_iterations_are_found_whatever_else_there_is(own: Path) -> None:
    for name in ("iter_" + "9" * 200, "iter_\u0661\u0661\u0661\u0661\u0661\u0661\u0661", "iter_0000011"):
        (own.parent / name).mkdir()
    assert iterations.published(own.parent)[:2] == [10, 11]
