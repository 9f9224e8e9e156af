"""Legacy files that are damaged, forged or of another model: one CheckpointError each, and no code is run."""

import argparse
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.formats.legacy.read import open_legacy
from megagrow.checkpoint.formats.megatron_common.arguments import arguments_of, layout_of_arguments, shape_of_arguments
from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.pickles.load import load_archive
from megagrow.checkpoint.pickles.tensor_pickle import PickledTensor
from megagrow.checkpoint.pickles.zip_reader import ArchiveMembers
from megagrow.checkpoint.pickles.zip_writer import ZipWriter
from megagrow.config import ParallelLayout
from megagrow.errors import CheckpointError
from tests.unit.legacy.test_legacy import GPT, LAYOUTS, LLAMA, MIXTURE, edit, export


class Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.file}",)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine")
    export(path, LLAMA, LAYOUTS["TP2"])
    return path


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.booleans())
def test_a_damaged_file_gives_an_error_of_one_line_or_values(pristine: Path, seed: int, cut: bool) -> None:
    chance = random.Random(seed)
    file = pristine / "mp_rank_01" / "model_optim_rng.pt"
    good = file.read_bytes()
    try:
        if cut:
            file.write_bytes(good[: chance.randrange(len(good))])
        else:
            place = chance.randrange(len(good) * 8)
            file.write_bytes(good[: place // 8] + bytes([good[place // 8] ^ 1 << place % 8]) + good[place // 8 + 1 :])
        try:
            opened = open_legacy(pristine)
            for key, info in opened.source.tensors.items():
                opened.source.read(key, tuple((0, size) for size in info.shape))
            assert not cut
        except CheckpointError as error:
            assert "\n" not in str(error) and str(pristine) in str(error)
    finally:
        file.write_bytes(good)


@pytest.mark.parametrize("place", ["args", "model", "optimizer", "beside"])
def test_a_hostile_state_is_refused_by_name_and_not_run(tmp_path: Path, place: str) -> None:
    export(tmp_path / "c", LLAMA, LAYOUTS["TP1"])
    trap = Touch(tmp_path / "ran")

    def set_trap(state: dict[str, Any]) -> None:
        if place == "args":
            state["args"].hook = trap
        elif place == "model":
            state["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = trap
        else:
            state[place] = {"state": trap}

    edit(tmp_path / "c", set_trap)
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt: refused: it would import posix\.system"):
        open_legacy(tmp_path / "c")
    assert not (tmp_path / "ran").exists(), "code from a checkpoint ran"


def first_tensor(state: dict[str, Any], change: Callable[[torch.Tensor], Any]) -> None:
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    state["model"][name] = change(state["model"][name])


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "old version": (
        lambda s: s.update(checkpoint_version=2.0),
        "checkpoint_version 2.0: its linear_qkv may have an older order",
    ),
    "no version": (lambda s: s.pop("checkpoint_version"), "checkpoint_version 0"),
    "no args": (lambda s: s.pop("args"), "records no arguments.*give source.num_attention_heads=.*source.rotary_base="),
    "no model": (lambda s: s.pop("model"), "contains no model"),
    "another model": (lambda s: s.update(model=[1]), "its model is list"),
    "unknown": (
        lambda s: s["model"].update(pooler=torch.ones(2)),
        "pooler: not a tensor of the model that its arguments describe",
    ),
    "missing": (lambda s: s["model"].pop("output_layer.weight"), "1 tensors are missing, first output_layer.weight"),
    "hole": (
        lambda s: s["model"].pop("decoder.layers.1.mlp.linear_fc2.weight"),
        "linear_fc2.weight: its chunks hold 288 of 384",
    ),
    "gap": (
        lambda s: [s["model"].pop(key) for key in list(s["model"]) if ".layers.1." in key],
        r"its layers are numbered \[0, 2, 3\]",
    ),
    "shape": (
        lambda s: first_tensor(s, lambda t: t[:, 1:].clone()),
        r"linear_proj\.weight has shape \[8, 7\], expected from its arguments is \[8, 8\]",
    ),
    "type": (lambda s: first_tensor(s, lambda t: t.int()), "its parts are float32, int32: no type holds all of them"),
    "layers": (lambda s: setattr(s["args"], "num_layers", 5), "ranks hold 4 layers, num_layers is 5"),
    "layout": (lambda s: setattr(s["args"], "pipeline_model_parallel_size", 2), "its name has 1 numbers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_state_that_is_not_the_models_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    export(tmp_path, LLAMA, LAYOUTS["TP1"])
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_legacy(tmp_path)


def test_a_shape_replaces_missing_arguments(tmp_path: Path) -> None:
    export(tmp_path, LLAMA, LAYOUTS["PP4"])
    for directory in sorted(tmp_path.glob("mp_rank_*")):
        edit(tmp_path, lambda state: state.pop("args"), directory.name)
    opened = open_legacy(tmp_path, shape=LLAMA)
    assert opened.shape == LLAMA and opened.layout is None


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no mp_rank_"):
        open_legacy(tmp_path)
    export(tmp_path, LLAMA, LAYOUTS["TP2"])
    file = tmp_path / "mp_rank_01" / "model_optim_rng.pt"
    good = file.read_bytes()
    torch.save(torch.load(file, weights_only=False), file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"mp_rank_01.*written by torch before 1\.6"):
        open_legacy(tmp_path)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)
    with pytest.raises(CheckpointError, match=r"data\.pkl is compressed"):
        open_legacy(tmp_path)
    file.write_bytes(good)
    file.rename(file.with_name("other.pt"))
    with pytest.raises(CheckpointError, match=r"mp_rank_01: has no model_optim_rng\.pt"):
        open_legacy(tmp_path)
    (tmp_path / "mp_rank_01").rename(tmp_path / "mp_rank_02")
    with pytest.raises(CheckpointError, match="2 mp_rank_. directories, 3 x 1 x 1 expected"):
        open_legacy(tmp_path)


def test_a_dict_that_holds_itself_many_times_is_refused_at_once(tmp_path: Path) -> None:
    export(tmp_path, LLAMA, LAYOUTS["TP1"])

    def nest(state: dict[str, Any]) -> None:
        inside: dict[str, Any] = {"t": torch.ones(1)}
        for _ in range(60):
            inside = {"a": inside, "b": inside}
        state["model"]["deep"] = inside

    edit(tmp_path, nest)
    with pytest.raises(CheckpointError, match="a dict that occurs twice"):
        open_legacy(tmp_path)


# Archives beyond the limits of the original zip format


def test_archives_beyond_4_gib_or_with_many_members_are_read(tmp_path: Path) -> None:
    frame, sizes = ZipWriter(), (5 << 30, 40, 8)
    headers, places = [], []
    for number, size in enumerate(sizes):
        at = frame.at
        headers.append((at, frame.header(f"data/{number}", size)))
        places.append(at + len(headers[-1][1]))
    tail_at, tail = frame.at, frame.end()
    file = tmp_path / "large.pt"
    with open(file, "wb") as stream:  # a sparse file: a few kilobytes on disk
        for at, data in (*headers, (tail_at, tail)):
            stream.seek(at)
            stream.write(data)
    handle = os.open(file, os.O_RDONLY)
    try:
        members = ArchiveMembers(handle, 0, file.stat().st_size, "large.pt")
        assert [members.place(f"data/{number}") for number in range(3)] == list(zip(places, sizes, strict=True))
        assert all(place % 64 == 0 for place in places)
    finally:
        os.close(handle)
    many = ZipWriter()
    data = b"".join(many.header(f"data/{number}", 0, align=False) for number in range(70_000))
    (tmp_path / "many.pt").write_bytes(data + many.end())
    with zipfile.ZipFile(tmp_path / "many.pt") as archive:
        assert len(archive.namelist()) == 70_000


def test_a_view_outside_its_storage_is_refused(pristine: Path) -> None:
    file = pristine / "mp_rank_00" / "model_optim_rng.pt"
    handle = os.open(file, os.O_RDONLY)
    try:
        members = ArchiveMembers(handle, 0, file.stat().st_size, "here")
        storage = type("Storage", (), {"dtype": torch.float32, "member": "0", "numel": 4})()
        with pytest.raises(CheckpointError, match=r"here: damaged: a tensor of \[9999999\] does not fit into"):
            members.payload(PickledTensor(storage, 0, (9999999,), (1,)))
    finally:
        os.close(handle)


# Arguments


@pytest.mark.parametrize("of", [LLAMA, GPT, MIXTURE])
def test_arguments_give_the_shape_from_which_they_were_made(of: Any) -> None:
    layout = ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True, data_parallel_size=3)
    args = arguments_of(of, layout, DType.BFLOAT16)
    explicit = {"num_query_groups": of.groups, "kv_channels": of.head_dim, "max_position_embeddings": of.positions}
    assert shape_of_arguments(args) == of.model_copy(update=explicit)
    assert layout_of_arguments(args) == layout


@pytest.mark.parametrize(
    "name,value",
    [
        ("squared_relu", True), ("multi_latent_attention", True), ("mtp_num_layers", 1), ("rotary_interleaved", True),
        ("apply_layernorm_1p", True), ("window_size", (128, 0)), ("heterogeneous_layers_config_path", "x.json"),
        ("moe_router_pre_softmax", True), ("moe_router_score_function", "sigmoid"), ("moe_layer_freq", [0, 1]),
        ("position_embedding_type", "mrope"), ("normalization", "L2Norm"), ("rotary_base", 10000.5),
    ],
)  # fmt: skip
def test_arguments_of_another_kind_of_model_are_refused_by_name(name: str, value: Any) -> None:
    args = arguments_of(MIXTURE, ParallelLayout(), DType.BFLOAT16) | {"use_rotary_position_embeddings": False}
    with pytest.raises(CheckpointError, match=rf"^common\.pt: args: .*{name}"):
        shape_of_arguments(args | {name: value}, "common.pt: args")


def test_missing_arguments_are_named() -> None:
    args = arguments_of(LLAMA, ParallelLayout(), DType.BFLOAT16)
    args["hidden_size"] = None
    del args["num_attention_heads"]
    with pytest.raises(CheckpointError, match="missing hidden_size, num_attention_heads; the model's shape"):
        shape_of_arguments(args)
    args = {"num_experts": 4, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    assert layout_of_arguments(args).expert_tensor_parallel_size == 1
    assert layout_of_arguments(args | {"num_experts": None}).expert_tensor_parallel_size is None
    assert layout_of_arguments(args | {"expert_tensor_parallel_size": 2}) == layout_of_arguments(
        args | {"expert_tensor_parallel_size": None}
    )


@pytest.mark.parametrize(
    "tokens,padded,tokenizer,wanted",
    [
        (None, 50304, "GPT2BPETokenizer", (50304, 128)),
        (50257, 50304, "GPT2BPETokenizer", (50257, 128)),
        (50200, 50432, "GPT2BPETokenizer", (50200, 256)),  # padded for two tensor-parallel ranks
        (255, 256, "NullTokenizer", (256, 128)),
        (30, 60, "Other", (30, 60)),
    ],
)
def test_the_vocabulary_keeps_its_padded_rows(
    tokens: int | None, padded: int, tokenizer: str, wanted: tuple[int, int]
) -> None:
    args = arguments_of(LLAMA, ParallelLayout(tensor_model_parallel_size=2), DType.BFLOAT16) | {
        "vocab_size": tokens, "padded_vocab_size": padded, "tokenizer_type": tokenizer,
        "make_vocab_size_divisible_by": 128,
    }  # fmt: skip
    shape = shape_of_arguments(args)
    assert (shape.vocab_size, shape.make_vocab_size_divisible_by) == wanted
    assert shape.padded_vocab_size == padded


def test_arguments_in_a_common_pt_are_read_as_plain_data_and_nothing_else_is(tmp_path: Path) -> None:
    args = argparse.Namespace(num_layers=4, params_dtype=torch.bfloat16, path=Path("/data"), inner={"a": (1, [2])})
    torch.save({"args": args, "iteration": 3}, tmp_path / "common.pt")
    found = load_archive(tmp_path / "common.pt", "common.pt")
    assert found["iteration"] == 3 and type(found["args"]) is dict
    assert found["args"]["num_layers"] == 4 and found["args"]["inner"] == {"a": (1, [2])}
    assert found["args"]["params_dtype"] is DType.BFLOAT16 and isinstance(found["args"]["path"], str)
    args.trap = Touch(tmp_path / "ran")
    torch.save({"args": args}, tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"^common\.pt: refused: it would import posix\.system$"):
        load_archive(tmp_path / "common.pt", "common.pt")
    assert not (tmp_path / "ran").exists()
