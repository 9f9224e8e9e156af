"""An export copies only files of its source: not from where the checkpoint says, nor through a link that leaves it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.hostile.conftest import Answer
from tools.reference.tiny_checkpoint import SMALL, shape

Command = Callable[..., Answer]
SECRET = '{"secret": true}'


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A directory that no export may look into."""
    found = tmp_path / "secret"
    found.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (found / name).write_text(SECRET)
    return found


# issue 12: C12
@pytest.mark.parametrize("named", ["{secret}", "{path}/../secret", "a\0b", "/" + "x" * 5000])
def test_a_directory_that_a_checkpoint_names_is_not_believed(
    path: Path, huggingface: Path, secret: Path, tmp_path: Path, here: Command, named: str
) -> None:
    named = named.format(secret=secret, path=path)
    common = torch.load(path / "common.pt", weights_only=True)
    config = json.loads((huggingface / "config.json").read_text())
    remembered = {"model_type": "llama", "config": config, "directory": named}
    torch.save({**common, "huggingface": remembered}, path / "common.pt")
    answer = here("convert", path, tmp_path / "out", *SHAPE, "--to", "huggingface")
    assert answer.code == 0, answer.err
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert "for its tokenizer; only files of the checkpoint itself are copied: --tokenizer" in answer.err
    assert all(line.isprintable() for line in answer.err.splitlines())


SHAPE = (
    *(f"source.{name}={value}" for name, value in shape(SMALL).model_dump(exclude_none=True).items()),
    "source.rope_scaling_factor=null",
)


# issue 12: C12
def test_a_link_that_leaves_the_source_is_not_followed(
    model: Path, secret: Path, tmp_path: Path, here: Command
) -> None:
    (model / "tokenizer.json").symlink_to(secret / "tokenizer.json")
    (model / "generation_config.json").symlink_to(secret / "generation_config.json")
    (model / "own.txt").write_text("inside")
    (model / "merges.txt").symlink_to("own.txt")
    answer = here("convert", model, tmp_path / "out", "--to", "huggingface")
    assert answer.code == 0, answer.err
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert sorted(found) == ["config.json", "merges.txt", "model.safetensors"] and found["merges.txt"] == b"inside"
    assert f"{model.resolve()}/tokenizer.json is a link that leaves its directory, and is not copied" in answer.err


# issue 12: C12
def test_the_links_of_a_hugging_face_cache_are_followed(
    model: Path, secret: Path, tmp_path: Path, here: Command
) -> None:
    """A snapshot has only links, to the blobs of the same model."""
    cache = tmp_path / "hub" / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (model / "tokenizer.json").write_text("{}")
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (cache / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    (cache / "snapshots" / "abc" / "tokenizer_config.json").symlink_to(secret / "tokenizer_config.json")
    answer = here("convert", cache / "snapshots" / "abc", tmp_path / "out", "--to", "huggingface")
    assert answer.code == 0, answer.err
    copied = tmp_path / "out" / "tokenizer.json"
    assert copied.read_text() == "{}" and not copied.is_symlink()
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


# issue 12: C12
def test_what_the_user_names_is_copied(model: Path, secret: Path, tmp_path: Path, here: Command) -> None:
    answer = here("convert", model, tmp_path / "out", "--to", "huggingface", "--tokenizer", secret)
    assert answer.code == 0 and (tmp_path / "out" / "tokenizer.json").read_text() == SECRET
