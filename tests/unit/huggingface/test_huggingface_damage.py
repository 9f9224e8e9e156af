"""Incomplete, unsafe or inconsistent Hugging Face directories: an error of one line each, and no value is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.formats.huggingface.read import open_huggingface
from megagrow.checkpoint.formats.huggingface.safetensors_header import read_header, write_header
from megagrow.checkpoint.index.dtypes import DType
from megagrow.errors import CheckpointError
from tests.unit.huggingface.test_huggingface import exported, put_tensors, tensors_of

INDEX = "model.safetensors.index.json"


def file_with(path: Path, header: Any, values: int = 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(values))
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_valid_header_is_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": entry("BF16", [2, 0], [8, 8]), "a": entry()}
    found = read_header(file_with(tmp_path / "f", header))
    assert {name: entry.shape for name, entry in found.items()} == {"a": (2,), "b": (2, 0)}
    assert found["a"].offset == (tmp_path / "f").stat().st_size - 8


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"[]", "holds list"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b"[" * 100_000, "damaged"),
        ({"a": 1}, "a: damaged: it lacks a dtype"),
        ({"a": entry(offsets=[0])}, "a: damaged: it lacks a dtype, a shape or two data_offsets"),
        ({"a": entry("F12")}, "a: unknown dtype 'F12'; supported are F32, BF16, F16"),
        ({"a": entry(["F32"])}, "unknown dtype"),
        ({"a": entry(shape=[-2])}, r"a: damaged: shape \(-2,\)"),
        ({"a": entry(shape=[2.0])}, "a: damaged: shape"),
        ({"a": entry(shape=[True])}, "a: damaged: shape"),
        ({"a": entry(offsets=[-8, 0])}, "a: damaged: shape"),
        ({"a": entry(shape=[3])}, r"\[3\] of F32 cannot be 8 bytes"),
        ({"a": entry(shape=[1 << 62], offsets=[0, 1 << 64])}, "cut short"),
        ({"a": entry(), "b": entry()}, "damaged: b overlaps the tensor before it"),
        ({"a": entry(shape=[1], offsets=[4, 8])}, "damaged: a follows a gap"),
        ({"a": entry(shape=[1], offsets=[0, 4])}, "damaged: [0-9]+ bytes, its header needs"),
        ({"a": entry(shape=[4], offsets=[0, 16])}, "cut short: [0-9]+ bytes, its header needs"),
    ],
)
def test_an_invalid_header_is_refused(tmp_path: Path, header: Any, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        read_header(file_with(tmp_path / "f", header))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, (1 << 62).to_bytes(8, "little") + b"{}", b"\xff" * 64])
def test_a_header_longer_than_its_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file: a header of [0-9]+ bytes in a file of"):
        read_header(tmp_path / "f")


def test_a_header_of_100_megabytes_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "f", "wb") as stream:
        stream.write((150_000_000).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="not a safetensors file: a header of 150000000 bytes"):
        read_header(tmp_path / "f")


def test_headers_are_padded_so_that_values_are_aligned() -> None:
    for width in range(1, 9):
        assert len(write_header([("x" * width, DType.FLOAT32, (3,))])) % 8 == 0


def change_index(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((path / INDEX).read_text())
    change(content)
    (path / INDEX).write_text(json.dumps(content))


def _drop(content: dict[str, Any]) -> None:
    del content["weight_map"]["model.norm.weight"]


def _move(content: dict[str, Any]) -> None:
    places = content["weight_map"]
    places["model.norm.weight"] = next(file for file in places.values() if file != places["model.norm.weight"])


def _add(content: dict[str, Any]) -> None:
    content["weight_map"]["more"] = min(content["weight_map"].values())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: content.clear(), "no weight_map"),
        (lambda content: content.update(weight_map=[]), "no weight_map"),
        (_drop, "1 tensors are not listed, first model.norm.weight"),
        (_move, "lists model.norm.weight in model-0.*, which does not contain it"),
        (_add, "lists more in model-00001.*, which does not contain it"),
        (lambda content: content["weight_map"].update(x="../model.safetensors"), "refused: x is in '../model"),
        (lambda content: content["weight_map"].update(x="/etc/passwd"), "refused: x is in '/etc/passwd'"),
        (lambda content: content["weight_map"].update(x="weights.bin"), "refused: x is in 'weights.bin'"),
        (lambda content: content["weight_map"].update(x=7), "refused: x is in 7"),
        (lambda content: content["weight_map"].update(x="gone.safetensors"), "gone.safetensors: No such file"),
    ],
)
def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path: Path, change: Callable, expected: str) -> None:
    exported(tmp_path, "llama", shard_bytes=6_000)
    open_huggingface(tmp_path)
    change_index(tmp_path, change)
    with pytest.raises(CheckpointError, match=expected):
        open_huggingface(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    exported(tmp_path, "llama", shard_bytes=6_000)
    places = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    first, last = sorted(set(places.values()))[0], sorted(set(places.values()))[-1]
    (tmp_path / last).write_bytes((tmp_path / first).read_bytes())
    with pytest.raises(CheckpointError, match=f"is in both {first} and {last}: remove one"):
        open_huggingface(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    exported(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="neither model.safetensors nor .* pytorch_model.bin is a pickle, which"):
        open_huggingface(tmp_path)


def test_tensors_must_be_those_of_the_shape(tmp_path: Path) -> None:
    tensors = tensors_of(exported(tmp_path, "llama"))
    norm = tensors["model.norm.weight"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model.norm.weight": None}, "1 tensors are missing, first model.norm.weight$"),
        ({"lm_head.weight": None}, "first lm_head.weight; if the embedding is also the output layer, set tie_word_emb"),
        ({"score.weight": norm}, "1 tensors do not belong to a LlamaForCausalLM with this config.json, first score"),
        ({"model.norm.weight": norm[1:]}, r"model.norm.weight has shape \(23,\); config.json requires \(24,\)"),
    ]
    for changed, expected in cases:
        content = {name: values for name, values in (tensors | changed).items() if values is not None}
        with pytest.raises(CheckpointError, match=expected):
            open_huggingface(put_tensors(tmp_path, content))
    open_huggingface(put_tensors(tmp_path, tensors))


def test_a_type_that_is_not_for_weights_is_refused(tmp_path: Path) -> None:
    exported(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = "I32"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(CheckpointError, match="model.norm.weight is I32; supported are F32, BF16, F16"):
        open_huggingface(tmp_path)


def test_a_file_that_shrinks_later_is_named(tmp_path: Path) -> None:
    opened = open_huggingface(exported(tmp_path, "llama"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-16])
    with pytest.raises(CheckpointError, match="cut short"):
        opened.source.read("output_layer.weight", ((0, 50), (0, 24)))
