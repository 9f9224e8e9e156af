"""Opening a checkpoint takes memory and time in proportion to its files, whatever they ask for."""

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megagrow.checkpoint.formats.torch_dist.index import read_index
from megagrow.checkpoint.pickles import load_archive, scan
from megagrow.checkpoint.pickles.scan import check_pickle
from megagrow.checkpoint.pickles.walk import MAX_KEYS
from megagrow.errors import CheckpointError
from megagrow.files.bounded import parse_json, read_json
from tests.unit.hostile.opcodes import archive, before, named, pickle_in, plant, text, whole

GB = 1 << 30
MANY = 60_001
BRACKETS = 60_000_000
Refused = Callable[..., str]


def call(module: str, name: str, number: bytes) -> bytes:
    return named(module, name) + number + pickle.TUPLE1 + pickle.REDUCE


# issue 12: C11
def test_a_small_common_that_asks_for_2_gb(path: Path, refused: Refused) -> None:
    two_gb = pickle.BININT + (2 * GB - 8).to_bytes(4, "little")
    plant(path, "common.pt", call("builtins", "bytearray", two_gb))
    assert "common.pt: refused: it would import builtins.bytearray" in refused("inspect", path)


# issue 12: C11
@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_sixty_megabytes_of_brackets(path: Path, refused: Refused, name: str) -> None:
    lists = pickle.EMPTY_LIST * BRACKETS + pickle.POP * (BRACKETS - 1)
    if name == ".metadata":
        (path / name).write_bytes(before((path / name).read_bytes(), pickle.EMPTY_LIST * BRACKETS))
    elif name == "common.pt":
        (path / name).write_bytes(archive(before(pickle_in(path / name), lists)))
    else:
        (path / name).write_bytes(b"[" + b"[]," * (BRACKETS // 3) + b"[]]")
    line = refused("inspect", path)
    assert f"/{name}: " in line and ("MiB" in line or "bytes" in line)


# issue 12: C11
@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt"])
def test_a_sparse_file_of_gigabytes_is_not_read(path: Path, refused: Refused, name: str) -> None:
    os.truncate(path / name, 8 * GB)
    assert f"/{name}: " in refused("inspect", path)


# issue 12: C11
def test_a_sparse_archive_with_an_endless_directory(path: Path, refused: Refused) -> None:
    """The last bytes of a zip say how long the list of its members is, and `zipfile` reads all of it."""
    size = 3 * GB
    with open(path / "common.pt", "wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(b"PK\5\6" + bytes(4) + b"\xff\xff\xff\xff" + (size - 8).to_bytes(4, "little") + bytes(6))
    assert "common.pt: damaged: ValueError: a list of members of" in refused("inspect", path)


# issue 12: C11
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors"])
def test_a_sparse_file_of_a_model_is_not_read(model: Path, refused: Refused, name: str) -> None:
    if name == "model.safetensors.index.json":
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        (model / name).write_text("{}")
    os.truncate(model / name, 8 * GB)
    assert f"/{name}: " in refused("inspect", model)


# issue 12: C11
@pytest.mark.parametrize("name", ["megagrow.json", "integrity.json"])
def test_a_sparse_file_of_our_own_is_not_read(own: Path, refused: Refused, tmp_path: Path, name: str) -> None:
    os.truncate(own / name, 8 * GB)
    target = (tmp_path / "target", "parallel.tensor_model_parallel_size=2")
    words = refused("convert", own, *target)  # by its size, or by the first block that is not what was written
    assert f"/{name}: refused: it has 8,589,934,592 bytes" in words or f"/{name}: damaged" in words


DEEP = b"[" * 100_000


# issue 12: C11, C13
@pytest.mark.parametrize("name", ["metadata.json", "megagrow.json", "integrity.json"])
def test_deep_json_is_one_line(own: Path, one_line: Refused, tmp_path: Path, name: str) -> None:
    for deep in (DEEP, b'{"a":' * 900 + b"1" + b"}" * 900):
        (own / name).write_bytes(deep)
        target = (tmp_path / "target", "parallel.tensor_model_parallel_size=2")
        assert f"/{name}: damaged: " in one_line("convert", own, *target)


# issue 12: C11
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors"])
def test_deep_json_of_a_model_is_one_line(model: Path, one_line: Refused, name: str) -> None:
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    if name == "model.safetensors":
        deep = len(deep).to_bytes(8, "little") + deep
    elif name == "model.safetensors.index.json":
        (model / "model.safetensors").unlink()
    (model / name).write_bytes(deep)
    assert f"/{name}: damaged: brackets in brackets, more than 100 deep" in one_line("inspect", model)


# issue 12: C11
@pytest.mark.parametrize("field", ["num_hidden_layers", "num_key_value_heads"])
def test_a_config_with_400_000_layers(model: Path, refused: Refused, field: str) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"num_hidden_layers": 400_000} if field == "num_hidden_layers" else {
        "num_attention_heads": 1_000_000, "num_key_value_heads": 1_000_000, "head_dim": 2,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    assert "config.json: describes " in refused("inspect", model)


# issue 12: C11, C13
def test_numbers_of_4_000_digits_in_a_config(model: Path, one_line: Refused) -> None:
    config = json.loads((model / "config.json").read_text())
    for field in ("num_hidden_layers", "rope_theta", "rms_norm_eps", "hidden_size"):
        text_of = json.dumps(config | {field: 7}).replace(f'"{field}": 7', f'"{field}": {"9" * 4000}')
        (model / "config.json").write_text(text_of)
        assert "config.json: damaged: a number of 4000 digits" in one_line("inspect", model)


def side_by_side(path: Path, chunks: int) -> None:
    """Cut a tensor into so many chunks beside one another, which all begin and end together in the first dimension."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    size = torch.Size((4, 2 * chunks))
    entry = TensorStorageMetadata(TensorProperties(torch.bool), size, [])
    place = metadata.storage_data[MetadataIndex("decoder.final_layernorm.weight", torch.Size([0]))]
    for number in range(chunks):
        corner = torch.Size((0, 2 * number))
        entry.chunks.append(ChunkStorageMetadata(corner, torch.Size((4, 2))))
        metadata.storage_data[MetadataIndex("wide", corner)] = place
    metadata.state_dict_metadata["wide"] = entry
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


# issue 12: C11
def test_8_000_chunks_side_by_side(path: Path, command: Callable[..., object]) -> None:
    """Before, each was compared with each: 89 seconds."""
    side_by_side(path, 8000)
    answer = command("inspect", path)
    assert answer.code == 0 and answer.seconds < 30 and "in 8015 chunks" in answer.out  # type: ignore[attr-defined]  # one of two kinds


# issue 12: C11
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (pickle.EMPTY_SET * 2_000_000, "2,000,003 bytes would need 442 MiB"),
        (pickle.NONE + pickle.TUPLE1 * MANY, "tuples in tuples, more than 100 deep"),
        (b"\x8a\xff" + bytes(255), "a number of 255 bytes"),
        (b"I" + b"9" * 5000 + b"\n", "a number of 500. digits"),
        (b"r\xff\xff\xff\x0f", "memo index 268435455"),
        (pickle.NONE * 3_000_000 + pickle.TUPLE1 * MANY, "tuples in tuples, more than 100 deep"),
        ((pickle.MARK + pickle.LIST) * 1_000_000, "2,000,003 bytes would need 106 MiB"),
        (pickle.EXT1 + b"\1", "an extension code"),
        (pickle.BYTEARRAY8 + (9).to_bytes(8, "little") + bytes(9), "a bytearray"),
        (pickle.MARK + pickle.NONE + pickle.FROZENSET, "a frozenset"),
        (
            pickle.POP * 3 + (pickle.NONE + pickle.TUPLE1 + pickle.POP) * MANY,
            "takes an object that is not there",
        ),
    ],
)
def test_a_scan_refuses_what_would_cost_too_much(code: bytes, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_pickle(whole(code))


# issue 12: C11
def test_a_scan_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_MAX_STEPS", 100_000)
    with pytest.raises(ValueError, match="more than 100,000 strings and tuples"):
        check_pickle(whole(text("") * 100_001))
    with pytest.raises(ValueError, match="100,000 other objects"):
        check_pickle(whole((pickle.NONE + pickle.TUPLE1 + pickle.POP) * MANY))


# issue 12: C11
def test_keys_whose_hashes_agree_are_limited() -> None:
    """-1 and -2 have one hash, so 2^20 tuples of them have: a dict of these takes hours."""
    minus = [pickle.BININT + (-n).to_bytes(4, "little", signed=True) for n in (1, 2)]
    keys = b"".join(
        pickle.MARK + b"".join(minus[number >> bit & 1] for bit in range(17)) + pickle.TUPLE + pickle.NONE
        for number in range(MAX_KEYS + 1)
    )
    with pytest.raises(ValueError, match=f"more than {MAX_KEYS} keys that are tuples"):
        check_pickle(whole(pickle.EMPTY_DICT + pickle.MARK + keys + pickle.SETITEMS))


# issue 12: C11
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (named("builtins", "set") + b"h\0" + pickle.TUPLE1 + pickle.REDUCE, "copies its values over and over"),
        (named("collections", "OrderedDict") + b"h\1" + pickle.TUPLE1 + pickle.REDUCE, "copies its values"),
        (named("_codecs", "encode") + b"h\2" + pickle.TUPLE1 + pickle.REDUCE, "copies its values over and over"),
        (named("megatron.core.enums", "ModelType") + b"h\2" + pickle.TUPLE1 + pickle.REDUCE, None),
        (named("argparse", "Namespace") + b"h\3" + pickle.REDUCE, "500 arguments"),
    ],
)
def test_a_short_pickle_does_not_become_a_large_value(code: bytes, expected: str | None) -> None:
    """A value that is long once is used ten thousand times."""
    pairs = b"".join(pickle.BININT2 + n.to_bytes(2, "little") + pickle.NONE + pickle.TUPLE2 for n in range(5000))
    content = pickle.MARK + b"".join(pickle.BININT2 + n.to_bytes(2, "little") for n in range(20_000)) + pickle.LIST
    content += b"q\0" + pickle.MARK + pairs + pickle.LIST + b"q\1" + text("x" * 1_000_000) + b"q\2"
    content += pickle.MARK + pickle.NONE * 500 + pickle.TUPLE + b"q\3"
    used = pickle.MARK + code * 10_000 + pickle.LIST
    started = time.monotonic()
    data = archive(whole(content + used))
    if expected is None:
        assert len(load_archive(data, "here")) == 10_000 and max(map(len, load_archive(data, "here"))) < 2000
    else:
        with pytest.raises(CheckpointError, match=expected):
            load_archive(data, "here")
    assert time.monotonic() - started < 20


# issue 12: C11
def test_a_small_pickle_that_is_endless_as_text_is_refused() -> None:
    nested: object = "x"
    for _ in range(40):
        nested = [nested, nested]
    with pytest.raises(CheckpointError, match="repeats values until"):
        load_archive(archive(pickle.dumps(nested, protocol=2)), "here")
    deep: object = "x"
    for _ in range(150):
        deep = [deep]
    with pytest.raises(CheckpointError, match="values in values, more than 100 deep"):
        load_archive(archive(pickle.dumps(deep, protocol=2)), "here")


# issue 12: C11
def test_one_chunk_that_is_listed_over_and_over_is_refused(path: Path) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    entry.chunks *= 1_000_000
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="has chunks that are stored nowhere"):
        read_index(path / ".metadata")


# issue 12: C11
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b"[" * 101 + b"]" * 101, "more than 100 deep"),
        (b'"' + b"[" * 200 + b'"', None),
        (b'["' + b"[" * 99 + b'\\"' + b"{" * 99 + b'"]', None),
        (b"[" * 100 + b"]" * 100, None),
        (b"[" + b"[]," * 1_000_000 + b"[]]", "1,000,002 brackets in 3,000,004 bytes"),
        (b"9" * 21, "a number of 21 digits"),
        (b"]" * 300, "damaged"),
        (b"\xff", "damaged"),
    ],
)
def test_json_is_bounded(tmp_path: Path, content: bytes, expected: str | None) -> None:
    (tmp_path / "a.json").write_bytes(content)
    if expected is None:
        assert read_json(tmp_path / "a.json") == parse_json(content, "here") == json.loads(content)
        return
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


# issue 12: C11
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "/dev/zero", "nowhere", "a\0b", "x" * 300):
        with pytest.raises(CheckpointError):
            read_json(tmp_path / name)
