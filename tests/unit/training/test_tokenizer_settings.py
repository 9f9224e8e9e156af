"""What a tokenizer's files may set beside the splitting of text, and that no training text depends on it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.command import Answer, megagrow, refused, saved_data, stored, write_family, write_jsonl

TEXTS = ["abab ab", "ba", "a b a b ab ba ab", "b"] * 10
VOCABULARY = {"a": 0, "b": 1, " ": 2, "ab": 3, "<pad>": 4, "<s>": 5, "</s>": 6, "<unk>": 7}
PLAIN = {"abab ab": [3, 3, 2, 3], "ba": [1, 0], "b": [1]}


def tokenizer_file(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json as its library writes it, with changed sections."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [{"id": VOCABULARY[piece], "content": piece, "special": True, **plain} for piece in list(VOCABULARY)[4:]]
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": VOCABULARY, "merges": [["a", "b"]], **changes.pop("model", {}),
    }  # fmt: skip
    sections = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **sections, "added_tokens": special, "model": model, **changes}


def template(*steps: str) -> dict[str, Any]:
    """A post-processor; `A` is the text, anything else a special token."""

    def one(step: str) -> dict[str, Any]:
        kind = "Sequence" if step == "A" else "SpecialToken"
        return {kind: {"id": step, "type_id": 0}}

    special = {piece: {"id": piece, "ids": [VOCABULARY[piece]], "tokens": [piece]} for piece in steps if piece != "A"}
    pair = [one("A"), {"Sequence": {"id": "B", "type_id": 0}}]
    single = [one(step) for step in steps]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def prepare(
    root: Path, file: dict[str, Any], config: Any = None, texts: list[str] | None = None, **more: Any
) -> tuple[Answer, Path]:
    pytest.importorskip("tokenizers")
    tokenizer = root / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(json.dumps(file))
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tokenizer / "tokenizer_config.json").write_text(text)
    corpus = write_jsonl(root / "corpus.jsonl", texts or TEXTS)
    chosen = {"tokenizer_type": "HuggingFace", "tokenizer_model": str(tokenizer)}
    family = write_family(root, {"paths": [str(corpus)]}, tokenizer=chosen, **more)
    return megagrow("data", family), saved_data(family) / "corpus_text_document"


def check_plain(prefix: Path) -> None:
    """Every document is its text's ids and one </s>."""
    documents = stored(prefix)
    assert len(documents) == len(TEXTS)
    for text, ids in zip(TEXTS, documents, strict=True):
        assert ids[-1] == 6 and 6 not in ids[:-1]
        if text in PLAIN:
            assert ids == [*PLAIN[text], 6]
        assert "".join(list(VOCABULARY)[number] for number in ids[:-1]) == text


PADDING = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 4, "pad_type_id": 0,
           "pad_token": "<pad>"}  # fmt: skip
LEFT = {**PADDING, "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 8}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "padding": ({"padding": PADDING}, "padding"),
    "padding on the left to a multiple": ({"padding": LEFT}, "padding"),
    "truncation": ({"truncation": TRUNCATION}, "truncation to 3 tokens"),
    "dropout": ({"model": {"dropout": 0.5}}, "dropout 0.5"),
    "special tokens": ({"post_processor": template("<s>", "A")}, "<s> is not added"),
    "text twice": ({"post_processor": template("A", "A")}, ""),
    "all": (
        {"padding": PADDING, "truncation": TRUNCATION, "post_processor": template("<s>", "A", "</s>")},
        "<s> </s> is not added",
    ),
}


# issue 12: E19
@pytest.mark.parametrize("name", CHANGES)
def test_settings_of_a_tokenizer_json_for_batches_and_prompts_do_not_change_a_document(
    tmp_path: Path, name: str
) -> None:
    changes, note = CHANGES[name]
    answer, prefix = prepare(tmp_path, tokenizer_file(**changes))
    assert answer.code == 0, answer
    check_plain(prefix)
    assert note in answer.err


# issue 12: E19
@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True, "add_eos_token": True, "eos_token": "</s>"},
        {"padding_side": "left", "model_max_length": 2, "truncation_side": "left", "pad_token": "<pad>"},
        {"clean_up_tokenization_spaces": True, "split_special_tokens": False, "use_default_system_prompt": True},
    ],
)
def test_settings_of_a_tokenizer_config_do_not_change_a_document(tmp_path: Path, config: dict[str, Any]) -> None:
    answer, prefix = prepare(tmp_path, tokenizer_file(), config)
    assert answer.code == 0, answer
    check_plain(prefix)


# issue 12: E19
def test_what_splits_text_stays_part_of_the_tokenizer(tmp_path: Path) -> None:
    texts = [text.upper() for text in TEXTS]
    file = tokenizer_file(normalizer={"type": "Lowercase"})
    answer, prefix = prepare(tmp_path, file, {"do_lower_case": False, "eos_token": {"content": "</s>"}}, texts)
    assert answer.code == 0, answer
    check_plain(prefix)
    assert "capitals become small letters" in answer.err


# issue 12: E19
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"3": {"content": "<new>", "special": True}}}
    answer, _ = prepare(tmp_path, tokenizer_file(), config)
    refused(answer, "tokenizer_config.json", "id 3", "'<new>'", "'ab'", "do not belong together")


# issue 12: E19
@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("{", ("tokenizer_config.json", "cannot be read as JSON")),
        ("[" * 100_000, ("tokenizer_config.json", "cannot be read as JSON")),
        ("[1]", ("tokenizer_config.json", "not a JSON object")),
        ({"eos_token": "<gone>"}, ("eos_token '<gone>'", "not in the vocabulary")),
    ],
)
def test_a_broken_tokenizer_config_is_one_line(tmp_path: Path, config: Any, parts: tuple[str, ...]) -> None:
    answer, _ = prepare(tmp_path, tokenizer_file(), config)
    refused(answer, *parts)


# issue 12: E19
def test_data_that_an_older_megagrow_padded_is_not_trained(tmp_path: Path) -> None:
    answer, prefix = prepare(tmp_path, tokenizer_file(padding=PADDING))
    assert answer.code == 0
    record = prefix.parent / "prepared.json"
    old = json.loads(record.read_text())
    for name in ("version", "checksums", "pairs"):
        old.pop(name, None)
    record.write_text(json.dumps(old))
    for verb in (("data",), ("train", "--stage", "a")):
        line = refused(megagrow(verb[0], tmp_path / "family.yaml", *verb[1:]), "padding", "remove", prefix.parent)
        assert "older megagrow" in line
