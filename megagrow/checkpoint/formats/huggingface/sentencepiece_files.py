"""A SentencePiece `.model` as the files that transformers loads: tokenizer.json and tokenizer_config.json.

Without them transformers 4 takes a `.model` beside a Llama for Llama's own: it puts a <s> and a blank before every
text, which the model was not trained with. Sources: the formats of sentencepiece 0.2 (`sentencepiece_model.proto`) and
of tokenizers 0.20 and later (`Tokenizer.from_file`).
"""

import base64
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.errors import CheckpointError

_BLANK = "\u2581"
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of tokenizer files.

    Attributes:
        tokenizer: content of tokenizer.json.
        settings: content of tokenizer_config.json.
    """

    tokenizer: dict[str, Any]
    settings: dict[str, Any]


def tokenizer_files(path: Path) -> TokenizerFiles:
    """Return the files of a `.model`; CheckpointError if it is not one, or of a type that tokenizers does not have.

    The tokenizer adds nothing to a text, as in training. It does know special tokens where a text spells them out.
    """
    model = _read(path)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise CheckpointError(f"{path}: a SentencePiece model of type {trainer.model_type}; bpe and unigram are known")
    pieces = list(model.pieces)
    special = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
    added = [
        _added(number, each.piece, special[each.type]) for number, each in enumerate(pieces) if each.type in special
    ]
    unknown = next((number for number, each in enumerate(pieces) if each.type == _UNKNOWN), None)
    fallback = any(each.type == _BYTE for each in pieces)
    if trainer.model_type == _BPE:
        content = {
            "type": "BPE", "dropout": None, "unk_token": None if unknown is None else pieces[unknown].piece,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": fallback,
            "ignore_merges": False, "vocab": {each.piece: number for number, each in enumerate(pieces)},
            "merges": [list(pair) for pair in _merges(pieces)],
        }  # fmt: skip
    else:
        scores = [[each.piece, each.score] for each in pieces]
        content = {"type": "Unigram", "unk_id": unknown, "vocab": scores, "byte_fallback": fallback}
    names = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    names["pad_token"] = trainer.pad_id if trainer.pad_id >= 0 else trainer.eos_id
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": _normalizer(normalizer), "pre_tokenizer": None, "post_processor": None,
        "decoder": _decoder(prefixed=normalizer.add_dummy_prefix), "model": content,
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "add_bos_token": False,
        "add_eos_token": False, "model_input_names": ["input_ids", "attention_mask"],
        **{name: pieces[number].piece for name, number in names.items() if 0 <= number < len(pieces)},
    }  # fmt: skip
    return TokenizerFiles(tokenizer, settings)


def _read(path: Path) -> Any:
    message: Any = importlib.import_module("google.protobuf.message")  # neither of the two has types
    schema: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    if path.stat().st_size > _MOST_BYTES:
        raise CheckpointError(f"{path}: more than {_MOST_BYTES:,} bytes: no SentencePiece model")
    model = schema.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except message.DecodeError as error:
        raise CheckpointError(f"{path}: not a SentencePiece model: {error}") from None
    if not model.pieces:
        raise CheckpointError(f"{path}: not a SentencePiece model: it has no pieces")
    return model


def _added(number: int, piece: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": piece, **flags, "special": special}


def _merges(pieces: list[Any]) -> Iterator[tuple[str, str]]:
    """All pairs of pieces that join to a piece, in the order in which SentencePiece prefers them: by their score."""
    plain = {each.piece: number for number, each in enumerate(pieces) if each.type not in (_UNKNOWN, _CONTROL, _BYTE)}
    found = []
    for piece in plain:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in plain and right in plain:
                found.append((-pieces[plain[piece]].score, plain[left], plain[right], left, right))
    for _, _, _, left, right in sorted(found):
        yield left, right


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _BLANK})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _BLANK})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(*, prefixed: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
