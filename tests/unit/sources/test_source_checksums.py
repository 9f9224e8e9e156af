"""A conversion never gives a damaged source a fresh seal: what is read is compared with its checksums."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.directory import integrity
from megagrow.checkpoint.directory.blocks import BLOCK, sums_of_file
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.index import whole_box
from megagrow.checkpoint.reading import Files, block_check
from megagrow.errors import CheckpointError
from tests.reference.command_line import CommandLine, megagrow
from tests.reference.conversions import convert, small_source, without_blocks
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

__all__ = ["megagrow"]

SHAPE = [f"source.{name}={value}" for name, value in shape(SMALL).model_dump().items() if value is not None]
SHAPE += ["source.rope_scaling_factor=null"]
LARGE_VOCABULARY = shape(SMALL, vocab_size=90_000)
"""With Adam's state: 23 MB in one file, so that its blocks are many."""
DATA = "__0_0.distcp"


def without_manifest(path: Path) -> Path:
    """Turn a checkpoint into one that newer Megatron wrote and sealed."""
    (path / "megagrow.json").unlink()
    names = sorted(file.name for file in path.iterdir() if file.name != "integrity.json")
    files = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))
    return path


def flip(file: Path, at: int) -> int:
    with open(file, "r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 4]))
    return at


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shape(SMALL), random_state(shape(SMALL), optimizer=False))


@pytest.fixture(params=["ours", "older", "Megatron's"])
def any_source(request: pytest.FixtureRequest, source: Path) -> tuple[Path, list[str]]:
    """A sealed checkpoint, and what must be said about its shape."""
    if request.param == "ours":
        return source, []
    return (without_blocks(source), []) if request.param == "older" else (without_manifest(source), SHAPE)


def left_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) if folder.is_dir() else []


# issue 12: A4
@pytest.mark.parametrize("to", ["torch_dist", "huggingface", "legacy"])
def test_a_flipped_bit_is_refused_and_nothing_is_published(
    any_source: tuple[Path, list[str]], tmp_path: Path, megagrow: CommandLine, to: str
) -> None:
    source, sizes = any_source
    flip(source / DATA, (source / DATA).stat().st_size // 2)
    error = megagrow.refused("convert", source, tmp_path / "target", *sizes, "--to", to)
    assert f"{source / DATA}: damaged" in error
    assert not [name for name in left_in(tmp_path / "target") if not name.startswith(".")]


# issue 12: A4
@pytest.mark.parametrize("name", [".metadata", "common.pt", "megagrow.json", "metadata.json"])
def test_a_flipped_bit_in_a_small_file_is_refused(
    source: Path, tmp_path: Path, megagrow: CommandLine, name: str
) -> None:
    flip(source / name, (source / name).stat().st_size // 3)
    assert f"{source / name}: damaged" in megagrow.refused("convert", source, tmp_path / "target")


# issue 12: A4
def test_whole_sources_are_converted_and_the_result_says_what_was_compared(
    any_source: tuple[Path, list[str]], tmp_path: Path, megagrow: CommandLine
) -> None:
    source, sizes = any_source
    wanted = "files" if sizes or "blocks" not in json.loads((source / "integrity.json").read_text()) else "blocks"
    done = json.loads(megagrow.done("convert", source, tmp_path / "a", *sizes, "--json"))
    assert done["checksums"] == wanted
    assert json.loads((Path(done["target"]) / "conversion.json").read_text())["checksums"] == wanted
    exported = json.loads(megagrow.done("convert", source, tmp_path / "b", *sizes, "--to", "huggingface", "--json"))
    assert exported["checksums"] == wanted
    assert "checksum" in megagrow.done("convert", source, tmp_path / "c", *sizes)
    assert "0 faults" in megagrow.done("verify", done["target"])


# issue 12: A4
def test_a_flag_skips_the_comparison_and_the_result_says_so(
    any_source: tuple[Path, list[str]], tmp_path: Path, megagrow: CommandLine
) -> None:
    source, sizes = any_source
    flip(source / DATA, (source / DATA).stat().st_size // 2)
    flags = [*sizes, "--skip-checksums", "--json"]
    done = json.loads(megagrow.done("convert", source, tmp_path / "a", *flags))
    assert done["checksums"] == "skipped"
    assert json.loads((Path(done["target"]) / "conversion.json").read_text())["checksums"] == "skipped"
    for to in ("huggingface", "legacy"):
        done = json.loads(megagrow.done("convert", source, tmp_path / to, "--to", to, *flags))
        assert done["checksums"] == "skipped"


# issue 12: A4
def test_a_source_without_checksums_is_converted_and_the_result_says_so(
    source: Path, tmp_path: Path, megagrow: CommandLine
) -> None:
    for name in ("megagrow.json", "integrity.json"):
        (source / name).unlink()
    done = json.loads(megagrow.done("convert", source, tmp_path / "a", *SHAPE, "--json"))
    assert done["checksums"] == "none"
    assert "no checksums to compare" in megagrow.done("convert", source, tmp_path / "b", *SHAPE, "--to", "huggingface")


# issue 12: A4
def test_an_integrity_json_of_another_program_beside_another_format_is_no_obstacle(
    source: Path, tmp_path: Path, megagrow: CommandLine
) -> None:
    megagrow.done("convert", source, tmp_path / "hf", "--to", "huggingface")
    (tmp_path / "hf" / "integrity.json").write_text('{"packages": []}')
    done = json.loads(megagrow.done("convert", tmp_path / "hf", tmp_path / "back", "--json"))
    assert done["checksums"] == "none"
    weights = "model.safetensors"
    digest = hashlib.sha256((tmp_path / "hf" / weights).read_bytes()).hexdigest()
    (tmp_path / "hf" / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": {weights: digest}}))
    done = json.loads(megagrow.done("convert", tmp_path / "hf", tmp_path / "again", "--json"))
    assert done["checksums"] == "files"
    flip(tmp_path / "hf" / weights, 4000)
    assert f"{weights}: damaged" in megagrow.refused("convert", tmp_path / "hf", tmp_path / "third")


# issue 12: A4
def test_workers_compare_what_they_read_unless_told_otherwise(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", LARGE_VOCABULARY, random_state(LARGE_VOCABULARY))
    at = flip(source / DATA, (source / DATA).stat().st_size // 2)
    command = [sys.executable, "-m", "megagrow", "convert", str(source), str(tmp_path / "target"), "--workers", "2"]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    begin = at // BLOCK * BLOCK
    assert done.returncode == 2 and f"{DATA}: damaged: bytes {begin} to {begin + BLOCK}" in done.stderr
    assert not list((tmp_path / "target").glob("iter_*"))
    again = [*command, "--skip-checksums", "--restart", "--json"]
    done = subprocess.run(again, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["checksums"] == "skipped", done.stderr


# issue 12: A4
def test_a_run_that_skipped_is_not_forgotten_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_source(tmp_path / "small")
    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(integrity, "seal", lambda *given: (_ for _ in ()).throw(InterruptedError()))
        convert(source, tmp_path / "large", checksums=False)
    final = convert(source, tmp_path / "large")
    assert json.loads((final / "conversion.json").read_text())["checksums"] == "skipped"


# issue 12: A4
@pytest.mark.parametrize("verb", ["inspect", "diff", "verify"])
def test_other_readers_refuse_a_damaged_checkpoint(
    source: Path, tmp_path: Path, megagrow: CommandLine, verb: str
) -> None:
    whole = Path(shutil.copytree(source, tmp_path / "whole"))
    flip(source / (".metadata" if verb == "inspect" else DATA), 5000)
    code, printed, error = megagrow(verb, source, *([whole] if verb == "diff" else []))
    assert code == 2 and "damaged" in printed + error


# What is written


# issue 12: A4
@pytest.mark.parametrize("sha256", [True, False])
def test_a_conversion_writes_checksums_of_blocks_that_older_readers_pass_over(
    source: Path, tmp_path: Path, megagrow: CommandLine, sha256: bool
) -> None:
    megagrow.done("convert", source, tmp_path / "target", *(["--sha256"] if sha256 else []))
    check_written(next((tmp_path / "target").glob("iter_*")), "sha256" if sha256 else "xxh3_128")


# issue 12: A4
def test_the_seal_of_training_has_checksums_of_blocks(tmp_path: Path) -> None:
    check_written(write_checkpoint(tmp_path, LARGE_VOCABULARY, random_state(LARGE_VOCABULARY)), "sha256")


def check_written(path: Path, algorithm: str) -> None:
    content = json.loads((path / "integrity.json").read_text())
    names = {file.name for file in path.iterdir()} - {"integrity.json"}
    assert content["algorithm"] == algorithm and content["files"].keys() == names
    assert content["blocks"]["files"].keys() == names and content["blocks"]["size"] == BLOCK
    for name, entry in content["files"].items():
        data = (path / name).read_bytes()
        if algorithm == "sha256":  # the only form that `verify_integrity_manifest` of newer Megatron reads
            assert entry == hashlib.sha256(data).hexdigest()
        else:
            assert entry.keys() == {"size", algorithm} and entry["size"] == len(data)
        blocks = content["blocks"]["files"][name]
        assert blocks["size"] == len(data) and len(blocks["sums"]) == 16 * -(-len(data) // BLOCK)
    integrity.check(path)
    assert (path / "integrity.json").stat().st_size < 4096 + sum(file.stat().st_size for file in path.iterdir()) / 5000


# issue 12: A4
def test_block_sums_that_do_not_belong_to_the_files_hash_are_found(source: Path) -> None:
    file = source / "integrity.json"
    content = json.loads(file.read_text())
    sums = content["blocks"]["files"][DATA]["sums"]
    content["blocks"]["files"][DATA]["sums"] = sums[:-1] + ("0" if sums[-1] != "0" else "1")
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"integrity\.json: damaged: the checksums of the blocks of __0_0"):
        integrity.check(source)


@pytest.mark.parametrize(
    "blocks",
    [
        [], {}, {"algorithm": "md5"}, {"algorithm": "xxh3_64", "size": 0, "files": {}},
        {"algorithm": "xxh3_64", "size": 1 << 40, "files": {}}, {"algorithm": "xxh3_64", "size": True, "files": {}},
        {"algorithm": "xxh3_64", "size": BLOCK, "files": {}},
        {"algorithm": "xxh3_64", "size": BLOCK, "files": {DATA: {"size": 10**30, "sums": ""}}},
        {"algorithm": "xxh3_64", "size": BLOCK, "files": {DATA: {"size": -1, "sums": ""}}},
    ],
)  # fmt: skip
def test_malformed_block_sums_are_named(source: Path, blocks: Any) -> None:
    content = json.loads((source / "integrity.json").read_text())
    (source / "integrity.json").write_text(json.dumps({**content, "blocks": blocks}))
    for read in (integrity.check, TorchDistReader):
        with pytest.raises(CheckpointError, match=r"integrity\.json: (damaged|files and blocks)"):
            read(source)


def test_a_name_in_a_seal_never_leads_out_of_the_checkpoint(source: Path) -> None:
    content = json.loads((source / "integrity.json").read_text())
    del content["blocks"]
    for name in ("../source/common.pt", "/etc/passwd", "a\0b"):
        (source / "integrity.json").write_text(json.dumps({**content, "files": {name: "0" * 64}}))
        with pytest.raises(CheckpointError, match=r"integrity\.json: damaged: ValueError: file name"):
            integrity.check(source)


# The reader


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("large"), LARGE_VOCABULARY, random_state(LARGE_VOCABULARY))


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Path, int]]]:
    """The blocks that are compared, in order."""
    seen: list[tuple[Path, int]] = []
    digest = block_check.BlockCheck._digest

    def note(self: block_check.BlockCheck, handle: int, number: int, *rest: Any) -> bytes:
        seen.append((self._file, number))
        return digest(self, handle, number, *rest)

    monkeypatch.setattr(block_check.BlockCheck, "_digest", note)
    yield seen


def test_each_block_is_compared_once_when_it_is_first_read(large: Path, digests: list[tuple[Path, int]]) -> None:
    reader = TorchDistReader(large)
    key = "embedding.word_embeddings.weight"
    rows = reader.tensors[key].shape[0]
    reader.read(key, ((0, 10), (0, 8)))
    few = len(digests)
    assert 0 < few <= 4
    reader.read(key, ((0, 10), (0, 8)))
    assert len(digests) == few, "compared before"
    for first in range(0, rows, 777):
        reader.read(key, ((first, min(first + 777, rows)), (0, 8)))
    for name in reader.tensors:
        reader.read_whole(name)
    assert len(digests) == len(set(digests)) <= -(-(large / DATA).stat().st_size // BLOCK)


def test_every_bit_that_is_read_has_been_compared(large: Path, tmp_path: Path) -> None:
    """A flip is found by the first read that touches its block, of whatever size; other reads do not mind it."""
    path = Path(shutil.copytree(large, tmp_path / "damaged"))
    size = (path / DATA).stat().st_size
    for at in (0, BLOCK - 1, BLOCK, 5 * BLOCK + 77, size - 1):
        flip(path / DATA, at)
        begin = at // BLOCK * BLOCK
        end = min(begin + BLOCK, size)
        touching = [(at, 1), (begin, 1), (end - 1, 1), (begin, end - begin), (max(begin - 9, 0), 20), (0, size)]
        for offset, length in touching:
            files = Files(path)
            with pytest.raises(CheckpointError, match=f"{DATA}: damaged: bytes {begin} to {end} are not"):
                files.read(DATA, offset, memoryview(bytearray(length)))
        files = Files(path)
        for offset, length in ((0, begin), (end, size - end)):
            files.read(DATA, offset, memoryview(bytearray(length)))
            assert files.source(DATA)(length, offset) == (path / DATA).read_bytes()[offset : offset + length]
        Files(path, checksums=False).read(DATA, at, memoryview(bytearray(1)))
        flip(path / DATA, at)


def test_a_file_that_grew_is_refused(large: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(large, tmp_path / "longer"))
    with open(path / DATA, "ab") as stream:
        stream.write(b"more")
    files = Files(path)
    with pytest.raises(CheckpointError, match="longer than the"):
        files.read(DATA, (path / DATA).stat().st_size - 4, memoryview(bytearray(4)))


def test_comparing_takes_a_small_buffer_whatever_the_size_of_a_block(large: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(large, tmp_path / "one"))
    content = json.loads((path / "integrity.json").read_text())
    size = (path / DATA).stat().st_size
    content["blocks"]["size"] = 1 << 28  # one block, larger than the file
    for name, entry in content["blocks"]["files"].items():
        entry["sums"] = sums_of_file(path / name, 1 << 28).sums.hex()
    (path / "integrity.json").write_text(json.dumps(content))
    files, one = Files(path), memoryview(bytearray(1))
    files.source(DATA)
    tracemalloc.start()
    files.read(DATA, size // 2, one)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_slices_are_the_same_with_and_without_checksums(large: Path) -> None:
    plain, compared = TorchDistReader(large, checksums=False), TorchDistReader(large)
    for key, info in plain.tensors.items():
        box = whole_box(info.shape)
        part = (*box[:-1], (1, box[-1][1]))
        for wanted in (box, part):
            assert (plain.raw(key, wanted) == compared.raw(key, wanted)).all()
