"""One small interface over the tokenizers that a family may use.

A tokenizer converts between text and ids, knows the size of its vocabulary and which id ends a document. The rest of
megagrow needs nothing more, so a SentencePiece model and a HuggingFace `tokenizer.json` are interchangeable here. A
model trained here is lossless: no normalization, unknown characters as bytes, spaces kept.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from megagrow.config.family import TokenizerConfig
from megagrow.errors import DataError

# Lines that a new SentencePiece model is trained on; more change its pieces little and cost memory.
_TRAINING_LINES = 2_000_000
_LONGEST_LINE = 4000
_CONTROL_PIECES = ("<unk>", "<s>", "</s>")
# Common names of the end-of-document token, tried where tokenizer_config.json does not name it.
_HF_END = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    """Converts text to ids and back. `eod` raises DataError where the tokenizer has no end-of-document token."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eod(self) -> int:
        """Id of the end of a document."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any special ones."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece `.model` file; its `</s>` ends a document."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=_existing(path).read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a SentencePiece model: {error}") from None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return int(self._model.vocab_size())

    @property
    def eod(self) -> int:
        """Id of the end of a document."""
        end = int(self._model.eos_id())
        if end < 0:
            raise DataError(f"{self.path}: this SentencePiece model has no </s> to end a document with; use another")
        return end

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any special ones."""
        return list(self._model.encode(text))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self._model.decode(ids))


class HuggingFaceTokenizer:
    """A `tokenizer.json`; `eos_token` of the `tokenizer_config.json` next to it ends a document."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise DataError(f"{path}: a HuggingFace tokenizer needs `pip install megagrow[hf]`") from None
        self.path = _existing(path)
        try:
            self._model = Backend.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{self.path}: not a HuggingFace tokenizer.json: {error}") from None
        # Text that looks like a special token must stay text: a corpus must not end its own documents.
        self._model.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eod(self) -> int:
        """Id of the end of a document."""
        settings = self.path.with_name("tokenizer_config.json")
        named = _eos_of(json.loads(settings.read_text(encoding="utf-8"))) if settings.is_file() else None
        for piece in [named] if named else _HF_END:
            if (found := self._model.token_to_id(piece)) is not None:
                return int(found)
        raise DataError(f"{self.path}: no end-of-document token: name it as eos_token in {settings}")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any special ones."""
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self._model.decode(ids, skip_special_tokens=False))


def load_tokenizer(config: TokenizerConfig, path: Path | None = None) -> Tokenizer:
    """Load the tokenizer in `path` (from `Prepared`) or, without it, in `tokenizer_model` of the config.

    DataError when the file is missing or is not a tokenizer of the configured type.
    """
    path = path or named_file(config)
    if path is None:
        raise DataError("tokenizer.tokenizer_model is not set and none was trained: run `megagrow data FAMILY`")
    return HuggingFaceTokenizer(path) if config.tokenizer_type == "HuggingFace" else SentencePieceTokenizer(path)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise DataError if the tokenizer has ids without an embedding in the model."""
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {vocab_size}: "
            f"set model.vocab_size to {tokenizer.vocab_size} or more in every stage"
        )


def named_file(config: TokenizerConfig) -> Path | None:
    """Return the tokenizer file given in the config; for a HuggingFace directory, the tokenizer.json in it."""
    path = config.tokenizer_model
    inside = path is not None and config.tokenizer_type == "HuggingFace" and path.is_dir()
    return path / "tokenizer.json" if path is not None and inside else path


def train_sentencepiece(texts: Iterable[str], config: TokenizerConfig, vocab_size: int, seed: int) -> bytes:
    """Train a SentencePiece model of at most `vocab_size` ids; return the bytes of its .model file.

    The same texts and seed give the same bytes: one thread, and for a corpus of more than 2 million lines a sample
    drawn with the seed. DataError when `vocab_size` is too small for the bytes and the common characters of the text.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed % 2**32)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            input_sentence_size=_TRAINING_LINES,
            shuffle_input_sentence=True,
            max_sentence_length=4 * _LONGEST_LINE + 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    return model.getvalue()


def _training_error(message: str, vocab_size: int) -> DataError:
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"model.vocab_size {vocab_size} is too small for this text: SentencePiece needs more than {needed[1]} "
            f"(256 bytes, {len(_CONTROL_PIECES)} control pieces and the text's characters); "
            "enlarge it or lower tokenizer.character_coverage"
        )
    return DataError(f"SentencePiece could not train {vocab_size} pieces from this text: {' '.join(message.split())}")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Split documents into lines, and long lines into parts, because SentencePiece skips longer lines."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist: set tokenizer.tokenizer_model or run `megagrow data FAMILY`")
    return path


def _eos_of(settings: dict[str, Any]) -> str | None:
    """Return the eos_token of a tokenizer_config.json: a string, or the content of an object."""
    end = settings.get("eos_token")
    return end.get("content") if isinstance(end, dict) else end
