"""Writes the tokenizer files that transformers loads from a SentencePiece model, and compares the two on probes."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from megagrow import extras
from megagrow.checkpoint.formats.huggingface import tokenizer_files

_PROBES, _PIECES = 200, 24


def write_tokenizer(model: Path, staging: Path) -> Iterator[str]:
    """Write tokenizer.json and, if there is none yet, tokenizer_config.json; yield what the user should know.

    Encodings are compared if the package tokenizers is there: on random texts of the vocabulary's own pieces, which
    have more ways to be cut than real ones.
    """
    files = tokenizer_files(model)
    (staging / "tokenizer.json").write_text(json.dumps(files.tokenizer, ensure_ascii=False) + "\n")
    settings = staging / "tokenizer_config.json"
    if not settings.exists():
        settings.write_text(json.dumps(files.settings, indent=2) + "\n")
    if not extras.is_installed("tokenizers"):
        command = extras.how_to_install("tokenizers")
        yield f"tokenizer.json is not compared with tokenizer.model: {command} brings what that needs"
        return
    if differing := _differing(model, staging / "tokenizer.json"):
        yield (
            f"tokenizer.json cuts {differing} of {_PROBES} random texts differently from tokenizer.model, which the "
            "model was trained with; both give the same text back"
        )


def _differing(model: Path, file: Path) -> int:
    """The number of probes that the two encode to different ids."""
    import sentencepiece
    import tokenizers

    old = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    new = tokenizers.Tokenizer.from_file(str(file))
    chance = random.Random(0)
    plain = [at for at in range(old.vocab_size()) if not (old.is_control(at) or old.is_unknown(at) or old.is_byte(at))]
    count = 0
    for _ in range(_PROBES if plain else 0):
        text = old.decode([chance.choice(plain) for _ in range(_PIECES)])
        count += list(old.encode(text)) != list(new.encode(text, add_special_tokens=False).ids)
    return count
