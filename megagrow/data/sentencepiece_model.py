"""SentencePiece: a `.model` file as a tokenizer, and training one on the family's own text.

A model trained here keeps text as it is: no normalization, unknown characters as bytes, spaces kept. One character is
lost by SentencePiece's design: it writes a blank as U+2581, so U+2581 in a text becomes a blank. `megagrow.data.encode`
counts them.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megagrow.config.family import TokenizerConfig
from megagrow.errors import DataError

# Lines that a new SentencePiece model is trained on; more change its pieces little and cost memory.
_TRAINING_LINES = 2_000_000
_LONGEST_LINE = 4000
_CONTROL_PIECES = ("<unk>", "<s>", "</s>")


class SentencePieceTokenizer:
    """A SentencePiece `.model` file; its `</s>` ends a document.

    Attributes:
        path: the .model file.
        notes: always empty; the file has no setting that is not followed.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path, self.notes = path, list[str]()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
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

    @property
    def unknown(self) -> int | None:
        """Id of text that is not in the vocabulary."""
        return int(self._model.unk_id())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any special ones."""
        return list(self._model.encode(text, add_bos=False, add_eos=False, reverse=False, enable_sampling=False))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self._model.decode(ids))


def train_sentencepiece(texts: Iterable[str], config: TokenizerConfig, vocab_size: int, seed: int) -> bytes:
    """Train a SentencePiece model of at most `vocab_size` ids; return the bytes of its .model file.

    The same texts and seed give the same bytes: one thread, and for a corpus of more than 2 million lines a sample
    drawn with the seed. DataError when `vocab_size` is too small for the bytes and the common characters of the text;
    an error of `texts` is raised as it is.
    """
    import sentencepiece

    model, lines = io.BytesIO(), _Lines(texts)
    sentencepiece.set_random_generator_seed(seed % 2**32)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
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
        if lines.error is not None:
            raise lines.error from None
        raise _training_error(str(error), vocab_size) from None
    if lines.error is not None:
        raise lines.error
    return model.getvalue()


def _training_error(message: str, vocab_size: int) -> DataError:
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"model.vocab_size {vocab_size} is too small for this text: SentencePiece needs more than {needed[1]} "
            f"(256 bytes, {len(_CONTROL_PIECES)} control pieces and the text's characters); "
            "enlarge it or lower tokenizer.character_coverage"
        )
    return DataError(f"SentencePiece could not train {vocab_size} pieces from this text: {' '.join(message.split())}")


class _Lines:
    """Documents as lines, long lines in parts, because SentencePiece skips longer lines.

    SentencePiece replaces an error of its iterator by one of its own, so the error is kept in `error`.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.error: BaseException | None = None
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in text.split("\n"):
                    for start in range(0, len(line), _LONGEST_LINE):
                        yield line[start : start + _LONGEST_LINE]
        except GeneratorExit:
            raise
        except BaseException as error:
            self.error = error
            raise
