"""Tokenizers: trained or given, lossless, with an end of document; files that cannot be used are named."""

import json
import random
import sys
from pathlib import Path

import pytest

from megagrow.config.family import TokenizerConfig
from megagrow.data import load_tokenizer
from megagrow.data.sentencepiece_model import train_sentencepiece
from megagrow.data.tokenizer import check_vocab
from megagrow.errors import DataError

WORDS = "the grown model reads every token of a corpus and writes its loss Größe 漢字 def return\n\tx = 1  # end".split(
    " "
)


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 80))) for _ in range(count)]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_trained_tokenizer_loses_nothing_and_is_the_same_again(tmp_path: Path, model_type: str) -> None:
    config = TokenizerConfig(model_type=model_type)  # type: ignore[arg-type]  # one of the literals
    model = train_sentencepiece(make_texts(80), config, 330, seed=3)
    assert model == train_sentencepiece(iter(make_texts(80)), config, 330, seed=3)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = load_tokenizer(config, tmp_path / "tokenizer.model")
    assert tokenizer.vocab_size <= 330 and tokenizer.eod == 2
    for sample in ("  two  spaces ", "def f():\r\n\treturn 'é'\n\n\n", "😀 unseen ß", "</s><unk>", "\0"):
        ids = tokenizer.encode(sample)
        assert tokenizer.decode(ids) == sample
        assert tokenizer.eod not in ids
    check_vocab(tokenizer, tokenizer.vocab_size)
    with pytest.raises(DataError, match=rf"has {tokenizer.vocab_size} ids, model.vocab_size is 300"):
        check_vocab(tokenizer, 300)


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size 200 is too small .* needs more than \d{3}"):
        train_sentencepiece(make_texts(10), TokenizerConfig(), 200, seed=0)


def test_tokenizer_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"gone.model does not exist: .*megagrow data"):
        load_tokenizer(TokenizerConfig(tokenizer_model=tmp_path / "gone.model"))
    with pytest.raises(DataError, match="junk.model: not a SentencePiece model"):
        load_tokenizer(TokenizerConfig(tokenizer_model=tmp_path / "junk.model"))
    with pytest.raises(DataError, match="megagrow data"):
        load_tokenizer(TokenizerConfig())


def make_huggingface(directory: Path, settings: dict[str, object] | None) -> TokenizerConfig:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<stop>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(make_texts(40), trainer)
    directory.mkdir()
    model.save(str(directory / "tokenizer.json"))
    if settings is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return TokenizerConfig(tokenizer_type="HuggingFace", tokenizer_model=directory)


@pytest.mark.parametrize(
    ("settings", "end"), [(None, 1), ({"eos_token": "<stop>"}, 0), ({"eos_token": {"content": "<stop>"}}, 0)]
)
def test_huggingface_encodes_special_names_as_text(
    tmp_path: Path, settings: dict[str, object] | None, end: int
) -> None:
    tokenizer = load_tokenizer(make_huggingface(tmp_path / "hf", settings))
    assert (tokenizer.eod, tokenizer.vocab_size) == (end, 320)
    sample = "a 漢 <stop> b</s>\n"
    ids = tokenizer.encode(sample)
    assert tokenizer.decode(ids) == sample and not {0, 1} & set(ids)


def test_without_the_hf_extra_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'megagrow\[hf\]"):
        load_tokenizer(TokenizerConfig(tokenizer_type="HuggingFace", tokenizer_model=tmp_path))
