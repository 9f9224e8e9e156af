"""The real tokens that a user names for `verify --deep`: a text, or a .bin/.idx pair."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megagrow.checkpoint.formats import open_checkpoint
from megagrow.config.family import TokenizerConfig
from megagrow.data.pair import open_pair
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import DataError
from megagrow.evaluate.deep import batches_of_ids
from megagrow.evaluate.live import TokenBatch

_MOST_IDS, _MOST_CHARACTERS = 1 << 16, 1 << 18
"""More than the few thousand tokens that are compared."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class NamedTokens:
    """What a user named: a text and perhaps its tokenizer, or the prefix of a pair."""

    text: Path | None = None
    tokenizer: Path | None = None
    data: Path | None = None


def named_batches(named: NamedTokens, child: Path, parent: Path) -> tuple[tuple[TokenBatch, ...] | None, str]:
    """Return batches of the named tokens, and what they are in words; None and "" where none were named.

    The tokenizer of a text is the one that was named, else one that lies beside the child or the parent.

    Raises:
        DataError: the tokens cannot be read, are too few, or have ids outside the parent's vocabulary.
    """
    if named.text is None and named.data is None:
        return None, ""
    if named.text is not None and named.data is not None:
        raise DataError("--text and --data: give one of them")
    if named.data is not None:
        pair = open_pair("--data", named.data)
        ids = torch.from_numpy(np.fromfile(f"{named.data}.bin", pair.dtype, count=_MOST_IDS).astype(np.int64))
        words = f"the tokens of {named.data}"
    else:
        assert named.text is not None
        ids, words = _encoded(named.text, named.tokenizer, (child, parent)), f"the text {named.text}"
    shape = open_checkpoint(parent).shape
    if shape is not None and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < shape.vocab_size:
        raise DataError(f"{words}: has ids outside the model's vocabulary of {shape.vocab_size}")
    return batches_of_ids(ids), words


def _encoded(text: Path, tokenizer: Path | None, places: tuple[Path, ...]) -> Tensor:
    beside = (place / name for place in places for name in _TOKENIZERS)
    found = tokenizer or next((file for file in beside if file.is_file()), None)
    if found is None:
        raise DataError(f"--text {text}: no tokenizer lies beside the checkpoints; give one with --tokenizer")
    if found.is_dir():
        found = next((found / name for name in _TOKENIZERS if (found / name).is_file()), found / _TOKENIZERS[0])
    if found.suffix == ".json":
        loaded = load_tokenizer(TokenizerConfig(tokenizer_type="HuggingFace", tokenizer_model=found))
    else:
        loaded = load_tokenizer(TokenizerConfig(tokenizer_type="SentencePiece", tokenizer_model=found))
    try:
        with open(text, encoding="utf-8", errors="replace") as stream:
            return torch.tensor(loaded.encode(stream.read(_MOST_CHARACTERS)), dtype=torch.int64)
    except OSError as error:
        raise DataError(f"--text {text}: cannot be read: {error.strerror}") from None
