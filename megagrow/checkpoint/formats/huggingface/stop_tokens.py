"""The ids that end, begin and pad a text, as the models of a family were trained with.

Training puts the end-of-document token after each document and nothing before one. So a text begins with no token,
unless the tokenizer has one token for both ends.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagrow.errors import CheckpointError
from megagrow.files.bounded import read_json_object

_SETTINGS = "tokenizer_config.json"
_MAX_BYTES = 256 << 20


def stop_tokens(file: Path) -> dict[str, int | None]:
    """Return bos_token_id, eos_token_id and pad_token_id of a tokenizer file; {} where no token ends a document.

    Args:
        file: a SentencePiece `.model`, or a tokenizer.json with a tokenizer_config.json beside it.
    """
    end, padding, begin = _of_model(file) if file.suffix == ".model" else _of_json(file)
    if end is None:
        return {}
    return {
        "bos_token_id": end if begin == end else None,
        "eos_token_id": end,
        "pad_token_id": end if padding is None else padding,
    }


def _of_model(file: Path) -> tuple[int | None, int | None, int | None]:
    """The ids of end, padding and begin in a SentencePiece model."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{file}: not a SentencePiece model: {error}") from None
    end, padding, begin = (int(each()) for each in (model.eos_id, model.pad_id, model.bos_id))
    return _or_none(end), _or_none(padding), _or_none(begin)


def _or_none(number: int) -> int | None:
    return number if number >= 0 else None


def _of_json(file: Path) -> tuple[int | None, int | None, int | None]:
    """The ids of end, padding and begin that the settings beside a tokenizer.json name."""
    place = file.with_name(_SETTINGS)
    if not place.is_file():
        return None, None, None
    settings, content = read_json_object(place, _MAX_BYTES), read_json_object(file, _MAX_BYTES)
    ids = _ids(content)
    end, padding, begin = (ids.get(_text(settings.get(name))) for name in ("eos_token", "pad_token", "bos_token"))
    return end, padding, begin


def _ids(content: Mapping[str, Any]) -> dict[str, int]:
    """All tokens of a tokenizer.json with their ids; a vocabulary that is a list is numbered in its order."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    found: dict[str, int] = {}
    if isinstance(vocab, dict):
        found = {str(token): at for token, at in vocab.items() if isinstance(at, int)}
    elif isinstance(vocab, list):
        found = {str(each[0]): at for at, each in enumerate(vocab) if isinstance(each, list) and each}
    added = content.get("added_tokens")
    for each in added if isinstance(added, list) else ():
        if isinstance(each, dict) and isinstance(each.get("id"), int):
            found[str(each.get("content"))] = each["id"]
    return found


def _text(token: Any) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)
