"""One small interface over the tokenizers that a family may use.

A tokenizer converts between text and ids, knows the size of its vocabulary and which id ends a document. The rest of
megagrow needs nothing more, so a SentencePiece model and a HuggingFace `tokenizer.json` are interchangeable here.
"""

from pathlib import Path
from typing import Protocol

from megagrow.config.family import TokenizerConfig
from megagrow.data.huggingface import HuggingFaceTokenizer, import_library
from megagrow.data.sentencepiece_model import SentencePieceTokenizer
from megagrow.errors import DataError

BLANK = "\u2581"
"""The character that SentencePiece, and tokenizers modeled on it, write for a blank."""
# Texts that differ, and what a tokenizer does that gives both the same ids.
_LOSSES = (
    ("a\nb", "a b", "a line break becomes a blank"),
    ("a\tb", "a b", "a tab becomes a blank"),
    ("a  b", "a b", "repeated blanks become one"),
    ("A", "a", "capitals become small letters"),
    ("\uff21", "A", "characters are normalized"),
)


class Tokenizer(Protocol):
    """Converts text to ids and back. `eod` raises DataError where the tokenizer has no end-of-document token."""

    notes: list[str]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eod(self) -> int:
        """Id of the end of a document."""
        ...

    @property
    def unknown(self) -> int | None:
        """Id of text that is not in the vocabulary; None where there is none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any special ones."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...


def load_tokenizer(config: TokenizerConfig, path: Path | None = None) -> Tokenizer:
    """Load the tokenizer in `path` (from `Prepared`) or, without it, in `tokenizer_model` of the config.

    DataError when the file is missing or is not a tokenizer of the configured type.
    """
    path = path or named_file(config)
    if path is None:
        raise DataError("tokenizer.tokenizer_model is not set and none was trained: run `megagrow data FAMILY`")
    hugging_face = config.tokenizer_type == "HuggingFace"
    if hugging_face:
        import_library(path)
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist: set tokenizer.tokenizer_model or run `megagrow data FAMILY`")
    return HuggingFaceTokenizer(path) if hugging_face else SentencePieceTokenizer(path)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError if the tokenizer has ids without an embedding in the model."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more in every stage"
        )


def describe(tokenizer: Tokenizer) -> list[str]:
    """Return what a user should know about a tokenizer file: settings that are not followed, and what text loses."""
    losses = [what for first, second, what in _LOSSES if tokenizer.encode(first) == tokenizer.encode(second)]
    return [*tokenizer.notes, *([f"it does not keep all text: {'; '.join(losses)}"] if losses else [])]


def loses_blank_mark(tokenizer: Tokenizer) -> bool:
    """Whether U+2581 in a text gives the ids of a blank."""
    return tokenizer.encode(f"a{BLANK}b") == tokenizer.encode("a b")


def named_file(config: TokenizerConfig) -> Path | None:
    """Return the tokenizer file given in the config; for a HuggingFace directory, the tokenizer.json in it."""
    path = config.tokenizer_model
    inside = path is not None and config.tokenizer_type == "HuggingFace" and path.is_dir()
    return path / "tokenizer.json" if path is not None and inside else path
