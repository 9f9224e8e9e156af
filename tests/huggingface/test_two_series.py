"""Exports in transformers 4.57 and 5: a family's own model and its tokenizer, and models grown in one command.

Each series is installed in a separate directory, with the packages that it needs, and runs in a separate process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from tests.distributed.ranks import families
from tests.huggingface.models import CASES, find_transformers, make
from tests.reference.command import ROOT, megagrow

pytestmark = pytest.mark.timeout(600)
SERIES = {"hf4": "4.57.", "hf": "5."}
TEXTS = [
    "one two three",
    "  two  blanks\n\tand a tab",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f642",
    "",
    "x" * 40,
    " lead",
    "trail ",
]
DOCUMENT = "one two three four"
IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3)).tolist()


def ask(series: str, directories: list[Path], **asked: Any) -> dict[str, Any]:
    """What a series says of models, by their directories."""
    if not (Path(sys.prefix) / series).is_dir():
        pytest.skip(f"transformers is not installed in {series}: `make test` puts it there")
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.prefix) / series), "PYTHONSAFEPATH": "1"}
    words = [sys.executable, "-W", "ignore", str(ROOT / "tests/huggingface/series.py"), *map(str, directories)]
    request = json.dumps({"texts": [], "ids": [], **asked})
    done = subprocess.run(words, input=request, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["version"].startswith(SERIES[series]), found["version"]
    return {Path(place).name: said for place, said in found["models"].items()}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of one stage that has learned to end a document; its save directory."""
    root = tmp_path_factory.mktemp("family")
    with open(root / "text.jsonl", "w") as stream:
        stream.writelines(json.dumps({"text": DOCUMENT}) + "\n" for _ in range(600))
        stream.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS if text.strip())
    stage = families.stage("small", families.LLAMA | {"num_layers": 2}, train_tokens=60 * families.TOKENS_PER_STEP)
    file = families.write_family(
        root / "saved", root / "text.jsonl", [{**stage, "export": "huggingface"}],
        evaluation={"eval_interval": 1000, "eval_samples": 4},
    )  # fmt: skip
    done = megagrow("run", file)
    assert done.returncode == 0, done.stderr
    return root / "saved"


@pytest.mark.parametrize("series", SERIES)
def test_a_familys_export_encodes_as_training_did_and_stops(family: Path, series: str) -> None:
    (exported,) = (path.parent for path in (family / "small").rglob("config.json"))
    trained = sentencepiece.SentencePieceProcessor(model_file=str(family / "data" / "tokenizer.model"))
    prompt = trained.encode("one two")
    said = ask(series, [exported], texts=TEXTS, prompts=[prompt])[exported.name]
    assert said["encoded"] == [trained.encode(text) for text in TEXTS]
    assert said["decoded"] == TEXTS
    end = trained.eos_id()
    assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"]) == (None, end, end)
    assert said["generation"] == [end, end] and said["eos_token"] == "</s>"
    assert said["generated"] == [[*trained.encode(DOCUMENT), end]]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Qwen2 and a Llama 3 that were grown in one command, and their parents."""
    if not find_transformers():
        pytest.skip("transformers is not installed: `make test` puts it into .venv/hf")
    root = tmp_path_factory.mktemp("grown")
    for name in ("qwen2", "llama"):
        make(CASES[name], root / f"{name}-parent")
        larger = [f"model.{key}={value}" for key, value in CASES[name].larger.items()]
        done = megagrow("convert", root / f"{name}-parent", root / name, "--to", "huggingface", *larger)
        assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("series", SERIES)
def test_a_model_that_was_grown_in_one_command_is_its_parent(grown: Path, series: str) -> None:
    """The parents were written by transformers 5, whose `rope_parameters` the older series does not read."""
    parents = ask("hf", [grown / f"{name}-parent" for name in ("qwen2", "llama")], ids=IDS)
    said = ask(series, [grown / name for name in ("qwen2", "llama")], ids=IDS)
    for name in ("qwen2", "llama"):
        child, parent = torch.tensor(said[name]["logits"]), torch.tensor(parents[f"{name}-parent"]["logits"])
        assert parent.abs().max() > 0.5 and (child - parent).abs().max() < 1e-5
        assert said[name]["parameters"] > parents[f"{name}-parent"]["parameters"]
