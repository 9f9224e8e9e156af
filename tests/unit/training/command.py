"""The command line in this process, and a small family, for tests of what a user's data becomes.

Nothing here or in the tests that use it imports a room of megagrow but `cli.main`, so they also run on older versions.
"""

import contextlib
import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import yaml

SEQUENCE = 16


class Answer(NamedTuple):
    """What a verb left: its exit code, its standard output, and its standard error with the log."""

    code: int
    out: str
    err: str


def megagrow(*arguments: Any, **environment: str) -> Answer:
    """Do what `megagrow ARGUMENTS` does in a process; an exception that is no SystemExit is raised."""
    from megagrow.cli.main import main

    out, err, logger = io.StringIO(), io.StringIO(), logging.getLogger("megagrow")
    code = 0
    with (
        mock.patch.object(sys, "argv", ["megagrow", *map(str, arguments)]),
        mock.patch.object(logger, "handlers", []),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            logger.propagate = True
    return Answer(code, out.getvalue(), err.getvalue())


def refused(answer: Answer, *parts: object, code: int = 2) -> str:
    """This exit code and one line on standard error, after progress, with these parts; return it."""
    assert answer.code == code, answer
    line = answer.err.splitlines()[-1]
    assert line.startswith("megagrow: error: ") and answer.err.count("megagrow: error") == 1, answer
    for part in parts:
        assert str(part) in line, (part, line)
    return line


def write_family(root: Path, source: dict[str, Any] | list[dict[str, Any]], **more: Any) -> Path:
    """Write family.yaml of one tiny stage; `model` and other sections are merged into their defaults."""
    sizes = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "vocab_size": 400}
    model = {**sizes, "seq_length": SEQUENCE, **more.pop("model", {})}
    stage = {
        "name": "a",
        "model": model,
        "batch": {"micro_batch_size": 2, "global_batch_size": 4},
        "precision": "fp32",
        "train_tokens": more.pop("steps", 4) * 4 * model["seq_length"],
    }
    sources = source if isinstance(source, list) else [{"name": "corpus", **source}]
    tree = {
        "name": "tiny",
        "save": str(root / "save"),
        "data": {"sources": sources, "workers": 1, "split": "80,20,0", **more.pop("data", {})},
        "evaluation": {"eval_interval": 1000, "eval_samples": 2},
        "stages": [stage],
        **more,
    }
    file = root / "family.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def stored(prefix: Path) -> list[list[int]]:
    """Documents of a .bin/.idx pair, read by the format's description and not by Megatron's reader."""
    index = Path(f"{prefix}.idx").read_bytes()
    dtype = {3: np.int16, 4: np.int32, 8: np.uint16}[index[17]]
    count = int.from_bytes(index[18:26], "little")
    ids = np.fromfile(f"{prefix}.bin", dtype)
    return [part.tolist() for part in np.split(ids, np.cumsum(np.frombuffer(index, np.int32, count, 34))[:-1])]


def write_pair(prefix: Path, documents: list[list[int]], dtype: type = np.int32) -> Path:
    """Write a .bin/.idx pair by the format's description; return its prefix."""
    codes: dict[Any, int] = {np.int16: 3, np.int32: 4, np.float32: 7, np.uint16: 8}
    code = codes[dtype]
    lengths = np.array([len(ids) for ids in documents], np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    pointers = (ends - lengths) * np.dtype(dtype).itemsize
    count = len(documents)
    head = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([code])
    head += count.to_bytes(8, "little") + (count + 1).to_bytes(8, "little")
    body = lengths.tobytes() + pointers.tobytes() + np.arange(count + 1, dtype=np.int64).tobytes()
    Path(f"{prefix}.idx").write_bytes(head + body)
    Path(f"{prefix}.bin").write_bytes(np.concatenate([np.array(ids, dtype) for ids in documents]).tobytes())
    return prefix


def saved_data(family: Path) -> Path:
    """The directory of a family's prepared data."""
    return family.parent / "save" / "data"
