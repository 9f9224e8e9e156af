"""Checkpoints that were damaged or not finished: found, named and set aside."""

import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.directory import blocks, integrity, iterations, recovery
from megagrow.checkpoint.directory.manifest import read_manifest
from megagrow.checkpoint.formats.torch_dist.index import read_index
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.pickles.load import load_archive
from megagrow.checkpoint.proof.verify import verify
from megagrow.checkpoint.tensors.table import optimizer_key, tensor_kinds
from megagrow.errors import CheckpointError
from megagrow.tracker import TRACKER
from tests.unit.checkpoint.conftest import FILES
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint


@pytest.fixture
def save(pristine: Path, tmp_path: Path) -> Path:
    """Three checkpoints and their tracker."""
    for iteration in (10, 20, 30):
        shutil.copytree(pristine, iterations.iteration_path(tmp_path / "save", iteration))
        iterations.write_tracker(tmp_path / "save", iteration)
    return tmp_path / "save"


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


# Sealed: no damage passes


@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found_and_named(path: Path, name: str) -> None:
    integrity.check(path)
    file, whole = path / name, (path / name).read_bytes()
    damages: dict[str, Callable[[], Any]] = {
        "flipped": lambda: flip(file, 8 * (len(whole) // 2)),
        "cut short": lambda: file.write_bytes(whole[:-1]),
        "empty": lambda: file.write_bytes(b""),
        "longer": lambda: file.write_bytes(whole + b"}"),
        "missing": file.unlink,
    }
    for damage in damages.values():
        damage()
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            integrity.check(path)
        file.write_bytes(whole)
    integrity.check(path)


def test_sizes_alone_are_compared_on_request(path: Path) -> None:
    flip(path / "__0_0.distcp", 4000)
    integrity.check(path, contents=False)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged: its sha256"):
        integrity.check(path)
    (path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: 1 bytes, \d+ were written"):
        integrity.check(path, contents=False)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_no_single_flip_or_cut_of_a_sealed_checkpoint_passes(
    pristine: Path, name: str, place: float, cut: bool
) -> None:
    file, whole = pristine / name, (pristine / name).read_bytes()
    try:
        if cut:
            file.write_bytes(whole[: int(len(whole) * place)])
        else:
            flip(file, int(8 * len(whole) * place))
        with pytest.raises(CheckpointError) as caught:
            integrity.check(pristine)
        assert "\n" not in str(caught.value)
    finally:
        file.write_bytes(whole)


def test_no_flipped_bit_of_the_size_of_blocks_passes(path: Path) -> None:
    """A file of one block has the same count of checksums for many sizes: the size itself must be one that we write."""
    file = path / integrity.INTEGRITY
    whole = file.read_bytes()
    number = str(blocks.BLOCK).encode()
    assert whole.count(number) == 1
    first = 8 * whole.index(number)
    for bit in range(first, first + 8 * len(number)):
        flip(file, bit)
        with pytest.raises(CheckpointError, match=r"integrity\.json"):
            integrity.check(path)
        file.write_bytes(whole)


# Not sealed: either our own error or values, and no code runs


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from([*FILES[:3], *FILES[4:]]), seed=st.integers(0, 2**32), cut=st.booleans())
def test_a_damaged_checkpoint_without_checksums_gives_an_error_or_values(
    pristine: Path, name: str, seed: int, cut: bool
) -> None:
    """`read_all` may return other numbers where a bit of a number flipped: only a checksum detects that."""
    rng = random.Random(seed)
    file, whole = pristine / name, (pristine / name).read_bytes()
    try:
        if cut:
            file.write_bytes(whole[: rng.randrange(len(whole))])
        else:
            flip(file, rng.randrange(8 * len(whole)))
        try:
            shapes = read_all(pristine)
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:
            assert not cut and all(tensor.numel() for tensor in shapes.values())
    finally:
        file.write_bytes(whole)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint except its checksums, which are not compared."""
    read_manifest(path)
    reader = TorchDistReader(path, checksums=False)
    reader.common()
    for key in reader.objects:
        reader.read_object(key)
    return {key: reader.read_whole(key) for key in reader.tensors}


@settings(max_examples=200, deadline=None)
@given(junk=st.binary(max_size=400))
def test_junk_is_no_archive_and_no_index(junk: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("junk") / ".metadata"
    file.write_bytes(junk)
    for load in (lambda: load_archive(junk, "here"), lambda: load_archive(file, "here"), lambda: read_index(file)):
        try:
            load()
        except CheckpointError as error:
            assert "\n" not in str(error)


# Values


def test_verify_finds_values_that_are_not_finite_and_reports_where(tmp_path: Path) -> None:
    key = "decoder.layers.mlp.linear_fc2.weight"
    for count, value in enumerate((float("nan"), float("inf")), start=1):
        state = random_state(shape(SMALL))
        state[key][1, 3, :count] = value
        path = write_checkpoint(tmp_path / str(count), shape(SMALL), state)
        faults = verify(path).faults
        assert faults[0].endswith(f"{key}[1:2, 0:8, 0:12]: {count} values are not finite")


def test_verify_finds_weights_that_are_not_their_masters(tmp_path: Path) -> None:
    """Megatron-Core's own save of a bucketed optimizer shifts masters like this, unless `bucket_repair` fixes it."""
    key = "decoder.layers.mlp.linear_fc2.weight"
    state = random_state(shape(SMALL))
    master = optimizer_key("param", key)
    state[master] = torch.roll(state[master], 1, dims=-1)
    (fault,) = verify(write_checkpoint(tmp_path, shape(SMALL), state)).faults
    assert f"{key}[0:1, 0:8, 0:12]: is not {master}, rounded" in fault


def test_verify_reads_everything_and_reports_how_much(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    findings = verify(path, progress=lambda done, total: seen.append((done, total)))
    tensors = tensor_kinds(shape(SMALL))
    values = sum(torch.Size(kind.global_shape(shape(SMALL))).numel() for kind in tensors)
    assert (findings.tensors, findings.values, findings.bytes) == (len(tensors), values, 4 * values)
    assert findings.objects == 4 * SMALL["num_layers"] and len(findings.checks) == 5 and not findings.faults
    assert seen[-1] == (len(tensors), len(tensors))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "surprise": 3}', "\xff"],
)
def test_a_damaged_manifest_is_named(path: Path, text: str) -> None:
    (path / "megagrow.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"megagrow\.json: (damaged|format 2|format None)"):
        read_manifest(path)


def test_a_missing_manifest_is_named(path: Path) -> None:
    (path / "megagrow.json").unlink()
    with pytest.raises(CheckpointError, match=r"no megagrow\.json: not written by megagrow"):
        read_manifest(path)
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        read_manifest(path / "nowhere")


def test_a_damaged_seal_is_named(path: Path) -> None:
    whole = json.loads((path / "integrity.json").read_text())
    wrong: list[Any] = [[], {}, {**whole, "algorithm": "md5"}, {**whole, "files": [1]}, {**whole, "files": {"a": 1}}]
    wrong += [{**whole, "files": {"a": {"size": float("inf"), "sha256": ""}}}]
    for content in wrong:
        (path / "integrity.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"integrity\.json: damaged"):
            integrity.check(path)


# Iteration directories and the tracker


def test_falling_back_moves_the_tracker_to_what_is_whole(save: Path) -> None:
    assert recovery.fall_back(save) is None and iterations.read_tracker(save) == 30
    (save / "iter_0000030" / "common.pt").unlink()
    assert recovery.fall_back(save) == 20 and iterations.read_tracker(save) == 20
    assert (save / "iter_0000030.refused").is_dir() and recovery.fall_back(save) is None
    for iteration in (10, 20):
        (iterations.iteration_path(save, iteration) / "common.pt").unlink()
    assert recovery.fall_back(save) is None and iterations.published(save) == [10, 20], "none is left: not touched"


def test_the_newest_whole_checkpoint_is_taken(save: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("megagrow").propagate = True  # the command line may have turned it off in this process
    assert recovery.newest_whole(save) == save / "iter_0000030"
    flip(save / "iter_0000030" / "common.pt", 99)
    (save / "iter_0000020" / ".metadata").unlink()
    assert recovery.newest_whole(save) == save / "iter_0000010"
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "iter_0000030/common.pt: damaged" in caplog.text and ".metadata is missing" in caplog.text
    names = sorted(entry.name for entry in save.iterdir())
    assert names == ["iter_0000010", "iter_0000020.refused", "iter_0000030.refused", TRACKER]
    assert recovery.newest_whole(save) == save / "iter_0000010"


def test_no_whole_checkpoint_left_is_an_error_and_not_a_fresh_start(save: Path) -> None:
    for iteration in (10, 20, 30):
        (iterations.iteration_path(save, iteration) / "common.pt").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="names 30, but no whole checkpoint is left"):
            recovery.newest_whole(save)


def test_checkpoints_after_the_tracker_are_not_taken(save: Path) -> None:
    iterations.write_tracker(save, 20)
    assert recovery.newest_whole(save) == save / "iter_0000020"
    iterations.write_tracker(save, 25)
    assert recovery.newest_whole(save) == save / "iter_0000020"


def test_iterations_without_a_tracker_are_an_error(save: Path, tmp_path: Path) -> None:
    (save / TRACKER).unlink()
    with pytest.raises(CheckpointError, match=r"has iterations \[10, 20, 30\] but no latest_checkpointed_iteration"):
        recovery.newest_whole(save)
    assert recovery.newest_whole(tmp_path / "nowhere") is None and iterations.published(tmp_path / "nowhere") == []


@pytest.mark.parametrize("text", [b"", b"release", b"-3", b"1.5", "²".encode(), b"\xff\xfe"])
def test_a_damaged_tracker_is_named(save: Path, text: bytes) -> None:
    (save / TRACKER).write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"{TRACKER}: contains .*newest of \[10, 20, 30\]"):
        iterations.read_tracker(save)


def test_the_tracker_is_never_half_written(save: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: Path, target: Path) -> None:
        assert source.read_text() == "40" and target.read_text() == "30"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        iterations.write_tracker(save, 40)
    monkeypatch.undo()
    assert iterations.read_tracker(save) == 30
    iterations.write_tracker(save, 40)
    assert iterations.read_tracker(save) == 40 and not list(save.glob(".latest*"))


def test_publishing_is_one_rename_and_replaces_only_on_request(save: Path) -> None:
    final = save / "iter_0000030"
    before = (final / "common.pt").read_bytes()
    staging = iterations.new_staging(final)
    (staging / "new").write_text("new")
    assert iterations.published(save) == [10, 20, 30]
    with pytest.raises(CheckpointError, match="iter_0000030: a checkpoint already exists; it is not changed"):
        iterations.publish(staging, final)
    assert (final / "common.pt").read_bytes() == before
    iterations.publish(staging, final, replace=True)
    assert [file.name for file in final.iterdir()] == ["new"] and not staging.exists()
    assert not list(save.glob(".iter_*"))


def test_the_newest_are_retained_and_staging_is_swept(save: Path) -> None:
    left = [iterations.new_staging(save / "iter_0000040") for _ in range(2)]
    (save / "iter_notes").mkdir()
    iterations.retain(save, 2)
    assert iterations.published(save) == [20, 30] and all(path.exists() for path in left)
    iterations.retain(save, 5)
    iterations.sweep(save)
    assert not any(path.exists() for path in left) and (save / "iter_notes").exists()
    assert iterations.published(save) == [20, 30]


def test_a_fingerprint_distinguishes_checkpoints(save: Path, tmp_path: Path) -> None:
    one, other = save / "iter_0000010", save / "iter_0000020"
    assert integrity.fingerprint(one) == integrity.fingerprint(other) != ""
    (other / "common.pt").write_bytes(b"changed")
    integrity.seal(other)
    assert integrity.fingerprint(one) != integrity.fingerprint(other)
    assert integrity.fingerprint(tmp_path) == ""
