"""A HuggingFace `tokenizer.json`, encoding text as training must: every document whole, and nothing added to it.

The file also carries settings of batches (padding, truncation), of regularization (BPE dropout) and of prompts (a
post-processor that adds special tokens). None of them belongs in a training text, so all are switched off here, and
`notes` says which were on. What splits text into ids (normalizer, pre-tokenizer, model, added tokens) stays as it is.
Megatron-LM does the same by default: its HuggingFaceTokenizer adds no special token without
`--tokenizer-hf-include-special-tokens`.
"""

import json
from pathlib import Path
from typing import Any

from megagrow import extras
from megagrow.errors import DataError

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files next to a tokenizer.json that may name its end-of-document token; the first that does is used."""
# Common names of the end-of-document token, tried where no settings file names it.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
# Settings of tokenizer_config.json with which transformers changes the tokenizer: name, the part of tokenizer.json
# that they change, and its field.
_OVERRIDES = (
    ("add_prefix_space", "pre_tokenizer", "add_prefix_space"),
    ("do_lower_case", "normalizer", "lowercase"),
    ("strip_accents", "normalizer", "strip_accents"),
    ("tokenize_chinese_chars", "normalizer", "handle_chinese_chars"),
)


class HuggingFaceTokenizer:
    """A `tokenizer.json`; `eos_token` of the `tokenizer_config.json` next to it ends a document.

    Attributes:
        path: the tokenizer.json.
        notes: one line for each setting of the files that is not followed.
    """

    def __init__(self, path: Path) -> None:
        backend = import_library(path)
        self.path = path
        try:
            self._model = backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a HuggingFace tokenizer.json: {error}") from None
        self._file = _read_json(path)
        self._settings = {name: _read_json(file) for name in SETTINGS_FILES if (file := path.with_name(name)).is_file()}
        self.notes = [
            *_switch_off(self._model),
            *_ignored_overrides(self._file, self._config),
            *_unknown_added_tokens(self._model, self._config, path),
        ]
        if not any(_text_of(settings.get("eos_token")) for settings in self._settings.values()):
            ends = [piece for piece in _ENDS if self._model.token_to_id(piece) is not None]
            self.notes += [f"documents end with {ends[0]}, because no file next to it names an eos_token"] * bool(ends)
        # Text that looks like a special token must stay text: a corpus must not end its own documents.
        self._model.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eod(self) -> int:
        """Id of the end of a document."""
        for name, settings in self._settings.items():
            if (piece := _text_of(settings.get("eos_token"))) is not None:
                found = self._model.token_to_id(piece)
                if found is None:
                    raise DataError(
                        f"{self.path.with_name(name)}: eos_token {piece!r} is not in the vocabulary of {self.path.name}"
                    )
                return int(found)
        for piece in _ENDS:
            if (found := self._model.token_to_id(piece)) is not None:
                return int(found)
        where = self.path.with_name(SETTINGS_FILES[0])
        raise DataError(f"{self.path}: no end-of-document token: name it as eos_token in {where}")

    @property
    def unknown(self) -> int | None:
        """Id of text that is not in the vocabulary; None where the file names none."""
        model = self._file.get("model", {})
        if isinstance(number := model.get("unk_id"), int):
            return number
        piece = model.get("unk_token")
        found = None if piece is None else self._model.token_to_id(piece)
        return None if found is None else int(found)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any special ones."""
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self._model.decode(ids, skip_special_tokens=False))

    @property
    def _config(self) -> dict[str, Any]:
        return self._settings.get(SETTINGS_FILES[0], {})


def import_library(path: Path) -> Any:
    """Return the class Tokenizer of the library `tokenizers`; DataError, naming a file that needs it, without it."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError(str(extras.missing("tokenizers", f"{path}: a HuggingFace tokenizer"))) from None
    return Tokenizer


def _switch_off(model: Any) -> list[str]:
    """Switch off what does not belong in a training text; return a note for each setting that was on."""
    notes = []
    if (padding := model.padding) is not None:
        notes.append(f"padding with {padding.get('pad_token')!r} is off: a document is no batch")
        model.no_padding()
    if (truncation := model.truncation) is not None:
        notes.append(f"truncation to {truncation.get('max_length')} tokens is off: documents are trained whole")
        model.no_truncation()
    for name in ("dropout", "alpha", "nbest_size"):
        if getattr(model.model, name, None):
            notes.append(f"{name} {getattr(model.model, name):g} is off: the same text always gives the same ids")
            setattr(model.model, name, None)
    if added := model.encode("", add_special_tokens=True).tokens:
        notes.append(f"its post-processor's {' '.join(added)} is not added: only append_eod adds a token to a document")
    # Without special tokens a template may still repeat the text; other post-processors change offsets only.
    model.post_processor = None
    return notes


def _ignored_overrides(file: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Return a note for each setting with which transformers would split text differently from the tokenizer.json."""
    notes = []
    for name, part, field in _OVERRIDES:
        if isinstance(asked := config.get(name), bool):
            values = [step[field] for step in _steps(file.get(part)) if isinstance(step.get(field), bool)]
            if any(value != asked for value in values):
                notes.append(
                    f"{name} {asked} of {SETTINGS_FILES[0]} is not followed: tokenizer.json has {not asked} and decides"
                )
    return notes


def _steps(part: Any) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer of a tokenizer.json: of a sequence, its members."""
    if not isinstance(part, dict):
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [part, *(step for member in inner for step in _steps(member))]


def _unknown_added_tokens(model: Any, config: dict[str, Any], path: Path) -> list[str]:
    """Return a note if tokenizer_config.json adds tokens; DataError if it gives an id that another token has."""
    added, missing = config.get("added_tokens_decoder"), []
    for number, token in added.items() if isinstance(added, dict) else ():
        piece = _text_of(token)
        if piece is None or not str(number).isdecimal() or len(str(number)) > 9:
            continue
        ours, other = model.token_to_id(piece), model.id_to_token(int(number))
        if ours != int(number) and (ours is not None or other is not None):
            has = f"there is {other!r}" if ours is None else f"it has the id {ours}"
            raise DataError(
                f"{path.with_name(SETTINGS_FILES[0])}: gives the id {number} to {piece!r}, but in {path.name} {has}: "
                "the files do not belong together"
            )
        if ours is None:
            missing.append(piece)
    return [f"{', '.join(missing)} of {SETTINGS_FILES[0]} stays text: tokenizer.json has no such token"] * bool(missing)


def _text_of(token: Any) -> str | None:
    """Return the text of a token of a settings file: a string, or the content of an object."""
    piece = token.get("content") if isinstance(token, dict) else token
    return piece if isinstance(piece, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object but {type(value).__name__}")
    return value
