"""A SentencePiece model as tokenizer.json: the same ids and the same text, by the package tokenizers."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from megagrow.checkpoint.formats.huggingface import stop_tokens, tokenizer_files
from megagrow.config.family import TokenizerConfig
from megagrow.data.sentencepiece_model import train_sentencepiece
from megagrow.errors import CheckpointError
from tests.reference.command import ROOT

TEXTS = [text for page in sorted((ROOT / "docs").glob("*.md")) for text in page.read_text().split("\n\n")]
PROBES = [
    *(text for text in TEXTS if "</s>" not in text and "<s>" not in text),
    "", " ", "  a  b\n\tc ", "caf\u00e9 \u65e5\u672c\u8a9e \U0001f642", " lead", "trail ", "\x00x", "x\r\ny",
]  # fmt: skip


def train(path: Path, kind: str, **more: Any) -> Path:
    """A model of 1,500 pieces of our own pages; with `more`, settings of sentencepiece that training here never has."""
    if not more:
        path.write_bytes(train_sentencepiece(iter(TEXTS), TokenizerConfig(model_type=kind), 1500, 0))
        return path
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=stream, vocab_size=1500, model_type=kind, byte_fallback=True,
        minloglevel=2, **more,
    )  # fmt: skip
    path.write_bytes(stream.getvalue())
    return path


def both(path: Path) -> tuple[Any, Any]:
    written = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_files(path).tokenizer))
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), written


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("bpe", {}),
        ("unigram", {}),
        ("bpe", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}),
        ("bpe", {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False}),
    ],
)
def test_ids_and_texts_are_sentencepieces(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    trained, written = both(train(tmp_path / "tokenizer.model", kind, **more))
    chance = random.Random(1)
    plain = [at for at in range(trained.vocab_size()) if not (trained.is_control(at) or trained.is_byte(at))]
    made = [trained.decode([chance.choice(plain[1:]) for _ in range(20)]) for _ in range(200)] if kind == "bpe" else []
    differing = 0
    for text in [*PROBES, *made]:
        ids = trained.encode(text)
        differing += ids != written.encode(text, add_special_tokens=False).ids
        assert written.encode(text).ids == written.encode(text, add_special_tokens=False).ids
        assert written.decode(ids) == trained.decode(ids)
    # unigram cuts a run of blanks at one of several places that are equally likely
    assert differing <= (0 if kind == "bpe" else 2)


def test_settings_add_nothing_and_name_the_ends(tmp_path: Path) -> None:
    path = train(tmp_path / "tokenizer.model", "bpe")
    settings = tokenizer_files(path).settings
    assert not settings["add_bos_token"] and not settings["add_eos_token"]
    assert (settings["eos_token"], settings["pad_token"], settings["unk_token"]) == ("</s>", "</s>", "<unk>")
    assert stop_tokens(path) == {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eos_token": "<end>"}, {"bos_token_id": None, "eos_token_id": 7, "pad_token_id": 7}),
        (
            {"eos_token": {"content": "<end>"}, "pad_token": "b", "bos_token": "a"},
            {"bos_token_id": None, "eos_token_id": 7, "pad_token_id": 1},
        ),
        ({"eos_token": "<end>", "bos_token": "<end>"}, {"bos_token_id": 7, "eos_token_id": 7, "pad_token_id": 7}),
        ({"eos_token": "not there"}, {}),
        (None, {}),
    ],
)
def test_stop_tokens_of_a_tokenizer_json(tmp_path: Path, settings: Any, expected: dict[str, int | None]) -> None:
    content = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7, "content": "<end>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert stop_tokens(tmp_path / "tokenizer.json") == expected


@pytest.mark.parametrize("content", [b"", b"junk", b"\x0a\xff"])
def test_what_is_no_model_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        tokenizer_files(tmp_path / "tokenizer.model")
